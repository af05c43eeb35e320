"""Test sliding-window layers against stock litgpt, without a loop over tokens or needless masks."""

import copy
import dataclasses
import io
from contextlib import redirect_stdout

import pytest
import torch
from architectures import ARCHITECTURES
from litgpt.config import Config
from litgpt.model import GPT
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_whittle.blocks import NonBlockModules, load_block, read_block, read_outside, run_block
from litgpt_whittle.checkpoint import load_model, save_checkpoint
from litgpt_whittle.distillation.head import hidden_states
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, SuperGPT, extract_weights, student_model
from litgpt_whittle.training.model_source import ModelSource
from litgpt_whittle.windows import WindowAttention, vectorize_windows

WINDOWED = {name: ARCHITECTURES[name] for name in ("Mathstral-7B-v0.1", "Gemma-2-2b", "Gemma-3-1b-it")}
MISTRAL = WINDOWED["Mathstral-7B-v0.1"]
EACH = pytest.mark.parametrize("config", WINDOWED.values(), ids=WINDOWED)
LENGTHS = pytest.mark.parametrize("length", [4, 5, 6, 24])
"""Below, at and above the window of 5 tokens"""


def stock(config: Config) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).eval()
    for name, tensor in model.state_dict().items():
        torch.nn.init.normal_(tensor, mean=1.0 if "norm" in name or "ln_f" in name else 0.0, std=0.2)
    return model


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(61, (2, length), generator=torch.Generator().manual_seed(1))


def same(got: torch.Tensor, expected: torch.Tensor, config: Config, length: int) -> None:
    """Assert equality: bit for bit, except if attention runs without a mask, in another kernel."""
    exact = length > config.sliding_window_size or config.attention_logit_softcapping is not None
    torch.testing.assert_close(got, expected, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-4)


class Operators(TorchDispatchMode):
    """Count operators."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


@EACH
@LENGTHS
def test_every_model_of_a_windowed_teacher_computes_what_litgpt_does(config, length, tmp_path):
    teacher, ids = stock(config), ids_of(length)
    last = config.n_layer - 1
    subnet = SubNet(config, n_embd="1-8,12-31", n_layer=f"0-0,{last}-{last}", intermediate_size=20)
    model = SuperGPT(config).eval()
    model.load_state_dict(teacher.state_dict())
    save_checkpoint(tmp_path / "teacher", config, teacher.state_dict())
    with torch.no_grad():
        expected = teacher(ids)
        same(model(ids), expected, config, length)
        same(load_model(tmp_path / "teacher")(ids), expected, config, length)
        built = ModelSource.choose(tmp_path / "teacher", None, None, None, None).build().eval()
        built.load_state_dict(teacher.state_dict())
        same(built(ids), expected, config, length)
        cut = GPT(subnet.config).eval()
        cut.load_state_dict(extract_weights(teacher, subnet))
        expected = cut(ids)
        for build in (student_model, LayerwiseGPT):
            ours = build(subnet).eval()
            ours.load_state_dict(cut.state_dict())
            same(ours(ids), expected, config, length)
        with model.running(subnet, materialize=True):
            same(model(ids), expected, config, length)
    assert sum(isinstance(module, WindowAttention) for module in built.modules()) == sum(config.sliding_window_indices)


@EACH
@LENGTHS
def test_a_block_on_its_own_computes_what_litgpt_does(config, length):
    """Covers the blocks that calibration and repair run."""
    teacher, ids = stock(config), ids_of(length)
    outside = NonBlockModules(config, read_outside(teacher.state_dict(), "cpu"), length, "cpu")
    outputs = []
    for block in teacher.transformer.h:
        block.register_forward_hook(lambda _, inputs, output: outputs.append((inputs[0], output)))
    with torch.no_grad():
        teacher(ids)
        for layer, (stream, expected) in enumerate(outputs):
            block = load_block(config, layer, read_block(teacher.state_dict(), layer, "cpu"))
            same(run_block(block, stream, outside.block_args[layer])["out"], expected, config, length)


@EACH
@LENGTHS
def test_gradients_are_those_of_litgpt_after_scoring_without_gradients(config, length):
    theirs, ids = stock(config), ids_of(length)
    ours = vectorize_windows(stock(config))
    with torch.inference_mode():
        ours(ids)
    for model in (theirs, ours):
        hidden_states(model, ids).hidden.square().sum().backward()
    for expected, got in zip(theirs.parameters(), ours.parameters()):
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masks_follow_precision_and_length(dtype):
    config = MISTRAL
    theirs, ours = stock(config).to(dtype), vectorize_windows(stock(config)).to(dtype)
    with torch.no_grad():
        for length in (24, 6, 24):
            assert torch.equal(ours(ids_of(length)), theirs(ids_of(length)))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(ours(ids_of(length)), theirs(ids_of(length)))


def test_without_a_mask_in_the_window_attention_is_causal(monkeypatch):
    """Flash attention takes no mask."""
    model, seen = vectorize_windows(stock(MISTRAL)), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask, is_causal, **kwargs):
        seen.append((attn_mask is None, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model(ids_of(5))
    assert seen == [(True, True)] * 4
    model(ids_of(6))
    assert seen[4:] == [(False, False)] * 4


@EACH
def test_the_number_of_operators_does_not_grow_with_the_length(config):
    model = SuperGPT(config).eval()
    counts = []
    for length in (6, 24):
        with torch.no_grad(), Operators() as operators:
            model(ids_of(length))
        counts.append(operators.n)
    assert counts[0] == counts[1]
    with torch.no_grad(), Operators() as operators:
        model(ids_of(24))
    assert operators.n < counts[1], "the mask is computed again for the same length"


def test_the_compiled_graph_does_not_grow_with_the_length():
    sizes = []

    def backend(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    expected = stock(dataclasses.replace(MISTRAL, n_layer=1))
    model = vectorize_windows(copy.deepcopy(expected))
    for length in (7, 24):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids_of(length)), expected(ids_of(length)), rtol=1e-4, atol=1e-4)
    assert len(sizes) == 2 and sizes[0] == sizes[1]


@EACH
def test_a_kv_cache_answers_as_litgpt_does(config):
    theirs, ours = stock(config), vectorize_windows(stock(config))
    ids = ids_of(12)
    with torch.no_grad(), redirect_stdout(io.StringIO()):
        for model in (theirs, ours):
            model.set_kv_cache(2)
        for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8)):
            at = torch.arange(start, stop)
            expected = theirs(ids[:, start:stop], at, input_pos_maxp1=stop)
            assert torch.equal(ours(ids[:, start:stop], at, input_pos_maxp1=stop), expected)
        for model in (theirs, ours):
            model.clear_kv_cache()
        assert torch.equal(ours(ids), theirs(ids))
