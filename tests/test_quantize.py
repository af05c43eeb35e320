"""Test a quantised teacher against a model whose weights bitsandbytes' own functions quantise and dequantise."""

import pytest
import torch
from litgpt import GPT, Config
from test_train import checkpoint, rows, run

from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.quantize import BITS, check_quantize, quantize, saved_bytes
from litgpt_whittle.errors import UserError

bnb = pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")


def config(**sizes) -> Config:
    usual = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_query_groups": 2, "block_size": 16, "intermediate_size": 128}
    kind = {"mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "padded_vocab_size": 96, "vocab_size": 96}
    return Config(**usual | kind | sizes)


def there_and_back(weight: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "bnb.int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    settings = {"quant_type": mode[4:7], "compress_statistics": mode.endswith("-dq")}
    return bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(weight, **settings))


@pytest.mark.parametrize("mode", BITS)
@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_those_of_the_rounded_weights(mode, bias):
    torch.manual_seed(0)
    model, expected = (GPT(config(bias=bias)).eval() for _ in range(2))
    expected.load_state_dict(
        {
            name: there_and_back(weight, mode) if ".h." in name and weight.ndim == 2 else weight
            for name, weight in model.state_dict().items()
        }
    )
    ids = torch.randint(96, (2, 16))
    with torch.no_grad():
        whole, wanted, found = model(ids), expected(ids), quantize(model, mode, CPU)(ids)
    # int8 also rounds the activations
    error = (found - wanted).norm() / wanted.norm()
    assert error < (0.05 if mode == "bnb.int8" else 1e-4)
    assert error < (whole - wanted).norm() / wanted.norm() or mode == "bnb.int8"
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


@pytest.mark.parametrize("mode", BITS)
def test_it_takes_the_memory_that_is_told(mode):
    model = GPT(config(n_embd=512, intermediate_size=2048, bias=False))
    before = sum(weight.nbytes for weight in model.parameters())
    quantize(model, mode, CPU)
    states = [m.weight.quant_state for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    scales = [part for state in states for part in (state.absmax, getattr(state.state2, "absmax", None))]
    rows_of_int8 = [m.weight.SCB for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    extra = sum(tensor.nbytes for tensor in [*scales, *rows_of_int8] if tensor is not None)
    after = sum(weight.nbytes for weight in model.parameters()) + extra
    assert before - after == pytest.approx(saved_bytes(model.config, mode, torch.float32), rel=0.01)


def test_distill_learns_from_a_quantised_teacher(tmp_path):
    teacher = {"teacher_checkpoint_dir": checkpoint(tmp_path / "teacher", n_embd=64), "distill": DistillArgs()}
    run(tmp_path / "whole", **teacher)
    run(tmp_path / "rounded", teacher_quantize="bnb.nf4", **teacher)
    whole, rounded = ([row["distill"] for row in rows(tmp_path / name)] for name in ("whole", "rounded"))
    assert whole != rounded and whole == pytest.approx(rounded, rel=0.15)


def test_what_cannot_be_quantised_is_refused(monkeypatch):
    check_quantize(None, "sharded")
    with pytest.raises(UserError, match="must be one of bnb.nf4, .*got 'bnb.int3'"):
        check_quantize("bnb.int3", "auto")
    with pytest.raises(UserError, match="cannot be sharded.*replicated"):
        check_quantize("bnb.nf4", "sharded")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_quantize("bnb.nf4", "auto")
