"""Test latency measurements: any student, and medians; no test asserts a time."""

import math

import pytest
import torch
from architectures import ARCHITECTURES, KINDS

from litgpt_whittle import latency as module
from litgpt_whittle.errors import UserError
from litgpt_whittle.latency import latency
from litgpt_whittle.subnet import SubNet

EACH = pytest.mark.parametrize("teacher", KINDS.values(), ids=KINDS)
LLAMA = ARCHITECTURES["Llama-3.1-8B"]


@EACH
def test_every_architecture_answers_a_prompt(teacher):
    """Including one longer than a sliding window, with layers of different widths."""
    widths = [1, 2] if teacher.n_query_groups > 1 else [1, 1]
    subnet = SubNet(teacher, n_layer="0,3", n_embd=20, n_query_groups=widths)
    for dtype in (torch.float32, torch.bfloat16):
        for seconds in latency(subnet, "cpu", dtype, batch_size=2, prompt_length=12, new_tokens=3, repeats=1):
            assert 0 < seconds < math.inf


def test_it_is_the_median_of_the_repeats_without_the_warm_up(monkeypatch):
    # (prefill, two decoded tokens) of the warm-up and of five repeats
    runs = [(90, 80), (5, 2), (1, 10), (3, 4), (2, 8), (4, 6)]
    ticks = []
    for prefill, decode in runs:
        start = ticks[-1] if ticks else 0
        ticks += [start, start + prefill, start + prefill + decode]
    clock = iter(ticks)
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock))
    found = latency(SubNet.full(LLAMA), prompt_length=4, new_tokens=2, repeats=5)
    assert found == (3, 3) and next(clock, None) is None


def test_the_student_reads_and_writes_what_it_should(monkeypatch):
    """Each forward pass with the KV cache gets each token once, at its position."""
    seen = []
    forward = module.GPT.forward

    def watch(self, idx, input_pos, input_pos_maxp1):
        seen.append((tuple(idx.shape), input_pos.tolist(), input_pos_maxp1))
        return forward(self, idx, input_pos, input_pos_maxp1=input_pos_maxp1)

    monkeypatch.setattr(module.GPT, "forward", watch)
    latency(SubNet.full(LLAMA), batch_size=3, prompt_length=6, new_tokens=2, repeats=1)
    once = [((3, 6), [0, 1, 2, 3, 4, 5], 6), ((3, 1), [6], 7), ((3, 1), [7], 8)]
    assert seen == once * 2
    seen.clear()
    teacher = ARCHITECTURES["Mathstral-7B-v0.1"]  # a window of 5
    latency(SubNet.full(teacher), prompt_length=7, new_tokens=1, repeats=1)
    assert seen[:3] == [((1, 5), [0, 1, 2, 3, 4], 5), ((1, 2), [5, 6], 7), ((1, 1), [7], 8)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"prompt_length": 0}, "prompt_length must be at least 1"),
        ({"new_tokens": 0}, "new_tokens must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"prompt_length": 20, "new_tokens": 5}, "must be at most the block_size 24, got 25"),
    ],
)
def test_bad_settings_are_refused_in_one_line(setting, message):
    with pytest.raises(UserError, match=message) as error:
        latency(SubNet.full(LLAMA), **setting)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "stablelm-base-alpha-3b"])
def test_a_step_that_attends_to_the_whole_cache_gives_the_same_token(name):
    """A CUDA graph has fixed shapes, so the captured step masks the positions after its own."""
    model = module._random_student(SubNet.full(ARCHITECTURES[name]), "cpu", torch.float32, 12)
    model.set_kv_cache(2, device="cpu", dtype=torch.float32)
    graph = object.__new__(module._DecodingGraph)  # __init__ needs a GPU
    with torch.inference_mode():
        token = module._next_token(model, torch.randint(50, (2, 7), generator=module._generator("cpu")), 0)
        for position in range(7, 12):
            graph.token, graph.position = token, torch.tensor([position])
            captured = graph._step(model)
            token = module._next_token(model, token, position)
            assert torch.equal(captured, token)
