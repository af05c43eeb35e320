"""Test closed-form costs against litgpt's own models, for every architecture."""

import pytest
import torch
from architectures import ARCHITECTURES, KINDS, subnets, sweep
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litgpt_whittle import metrics, processes
from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.latency import Latency
from litgpt_whittle.metrics import MEASURES, MeasureArgs, flops, kv_cache_bytes, weight_bytes
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import student_model

EACH = pytest.mark.parametrize("teacher", ARCHITECTURES.values(), ids=ARCHITECTURES)
EACH_KIND = pytest.mark.parametrize("teacher", KINDS.values(), ids=KINDS)
LLAMA = ARCHITECTURES["Llama-3.1-8B"]


def counted_flops(subnet: SubNet, batch_size: int, seq_length: int) -> float:
    """Return PyTorch's count of FLOPs per token in the student's forward pass."""
    model = student_model(subnet)
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.2)
    # PyTorch counts no FLOPs in its fused attention for CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(batch_size, seq_length, dtype=torch.int64))
    return counter.get_total_flops() / (batch_size * seq_length)


@sweep(ARCHITECTURES)
@settings(max_examples=6)
@given(data=st.data())
def test_flops_are_those_that_pytorch_counts(config, data):
    subnet = data.draw(st.sampled_from([SubNet.full(config), data.draw(subnets(config, sublayers=True))]))
    seq_length, batch_size = data.draw(st.sampled_from([1, 3, 11, 24])), data.draw(st.integers(1, 2))
    assert flops(config, subnet, seq_length) == counted_flops(subnet, batch_size, seq_length)


@EACH_KIND
@settings(max_examples=10)
@given(data=st.data())
def test_kv_cache_is_as_large_as_litgpts(teacher, data):
    subnet, dtype = (
        data.draw(subnets(teacher, sublayers=True)),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )
    batch_size, seq_length = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 4, 5, 6, 24]))
    with torch.device("meta"):
        model = student_model(subnet)
        model.set_kv_cache(batch_size, seq_length, dtype=dtype)
    caches = (block.attn.kv_cache for block in model.transformer.h)
    expected = sum(cache.k.nbytes + cache.v.nbytes for cache in caches if cache is not None)
    assert kv_cache_bytes(teacher, subnet, batch_size, seq_length, dtype) == expected


@EACH_KIND
@settings(max_examples=6)
@given(data=st.data())
def test_weights_are_as_large_as_the_students(teacher, data):
    subnet, tied = data.draw(subnets(teacher, sublayers=True)), data.draw(st.booleans())
    with torch.device("meta"):
        model = student_model(subnet).to(torch.bfloat16)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    own = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    assert weight_bytes(teacher, subnet, torch.bfloat16, tied) == sum(own.values())


def test_half_of_the_experts_cost_as_many_flops_as_all():
    teacher = ARCHITECTURES["Mixtral-8x7B-v0.1"]
    router = 2 * teacher.n_layer * teacher.n_embd * 2  # the router of half the experts is half as large
    all_of_them, half = SubNet.full(teacher), SubNet(teacher, n_expert=2)
    assert flops(teacher, all_of_them, 8) - flops(teacher, half, 8) == router
    assert weight_bytes(teacher, half, torch.float32) < weight_bytes(teacher, all_of_them, torch.float32)


def test_no_model_is_built_for_what_has_a_closed_form(monkeypatch):
    monkeypatch.setattr("litgpt.model.GPT.__init__", lambda *_: pytest.fail("a model was built"))
    for name in ("n_params", "flops", "kv_cache_bytes", "weight_bytes"):
        assert MEASURES[name](LLAMA, SubNet.full(LLAMA), MeasureArgs()) > 0


def test_measures_take_their_settings(monkeypatch):
    subnet, args = SubNet(LLAMA, n_layer=2), MeasureArgs(seq_length=8, batch_size=3, dtype="float16", tied=True)
    measured = []

    def fake(*given):
        measured.append(given)
        return Latency(0.5, 0.25)

    monkeypatch.setattr(metrics, "latency", fake)
    cost = {name: measure(LLAMA, subnet, args) for name, measure in MEASURES.items()}
    assert cost == {
        "n_params": n_params(LLAMA, subnet, tied=True),
        "flops": flops(LLAMA, subnet, 8),
        "kv_cache_bytes": kv_cache_bytes(LLAMA, subnet, 3, 8, torch.float16),
        "weight_bytes": weight_bytes(LLAMA, subnet, torch.float16, tied=True),
        "latency_prefill": 0.5,
        "latency_decode": 0.25,
    }
    [(_, device, dtype, batch_size, prompt_length, new_tokens)] = measured  # once for both
    assert (device, dtype, batch_size) == (str(processes.own_device()), torch.float16, 3)
    assert (prompt_length, new_tokens) == (6, 2)


def test_the_sequence_is_the_teachers_block_by_default():
    subnet = SubNet.full(LLAMA)
    assert MEASURES["flops"](LLAMA, subnet, MeasureArgs()) == flops(LLAMA, subnet, LLAMA.block_size)
    with pytest.raises(UserError, match="seq_length must be at most the teacher's block_size 24, got 25; lower it"):
        MEASURES["flops"](LLAMA, subnet, MeasureArgs(seq_length=25))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seq_length": 1}, "seq_length must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be float32, float16 or bfloat16, got 'int8'"),
        ({"device": "gpu"}, "device must be one such as cpu"),
    ],
)
def test_bad_settings_are_refused_in_one_line(setting, message):
    with pytest.raises(UserError, match=message) as error:
        MeasureArgs(**setting)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("measure", "text", "amount"),
    [
        ("n_params", "410M", 410e6),
        ("n_params", "1.5B", 1.5e9),
        ("n_params", 1_500_000, 1.5e6),
        ("flops", "1.5e9", 1.5e9),
        ("flops", "3 G", 3e9),
        ("weight_bytes", "2GB", 2e9),
        ("weight_bytes", "2GiB", 2 * 2**30),
        ("kv_cache_bytes", "512 mib", 512 * 2**20),
        ("kv_cache_bytes", "7B", 7),
        ("latency_decode", "10ms", 0.01),
        ("latency_prefill", "1_000 µs", 0.001),
        ("latency_prefill", "2.5e-3", 0.0025),
    ],
)
def test_limits_are_read_in_the_measures_unit(measure, text, amount):
    assert MEASURES[measure].parse(text) == (0, pytest.approx(amount))


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        ("n_params", "2GB"),
        ("weight_bytes", "10ms"),
        ("latency_decode", "2GB"),
        ("flops", "-1"),
        ("flops", "0"),
        ("flops", "1e999"),
        ("flops", ""),
        ("flops", "nan"),
        ("kv_cache_bytes", "much"),
    ],
)
def test_amounts_of_another_kind_are_refused_with_an_example(measure, text):
    unit = MEASURES[measure].unit
    with pytest.raises(UserError, match=f"an amount in {unit} looks like .*, got {text!r}"):
        MEASURES[measure].parse(text)
