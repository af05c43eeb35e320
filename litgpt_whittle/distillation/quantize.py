"""Quantise a teacher's blocks with bitsandbytes, so that it takes less memory."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT
from torch import nn

from litgpt_whittle.errors import UserError

BITS = {
    # an fp32 scale per 64 weights; "dq" (double quantisation) quantises the scales, too
    "bnb.nf4": 4 + 32 / 64,
    "bnb.nf4-dq": 4 + 8 / 64,
    "bnb.fp4": 4 + 32 / 64,
    "bnb.fp4-dq": 4 + 8 / 64,
    "bnb.int8": 8,
}
"""Bits per weight, by the names of `litgpt generate --quantize`"""


def check_quantize(mode: str | None, placement: str) -> None:
    """Check that the teacher can be quantised.

    Raises:
        UserError: If the mode is unknown, bitsandbytes is not installed, or the teacher would be sharded.
    """
    if mode is None:
        return
    if mode not in BITS:
        raise UserError(f"teacher_quantize must be one of {', '.join(BITS)}, got {mode!r}; choose one, or leave it out")
    if placement == "sharded":
        raise UserError(
            "a quantized teacher cannot be sharded, got teacher_placement sharded; use --teacher_placement replicated"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"teacher_quantize {mode} needs the package bitsandbytes; pip install bitsandbytes")


def quantize(model: GPT, mode: str, device: torch.device) -> GPT:
    """Quantise the linear layers of a model's blocks and move it to a device, block by block; the LM head is unchanged.

    Args:
        model: The model, in the compute dtype; on the CPU, memory-mapped or not.
        mode: One of `BITS`.
        device: The target device.
    """
    for block in model.transformer.h:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, _quantized(child, mode))
        block.to(device)
    return model.to(device)


def _quantized(linear: nn.Linear, mode: str) -> nn.Module:
    """Return the same layer with weights that bitsandbytes quantises when they are moved to a device."""
    import bitsandbytes as bnb

    has_bias, weight = linear.bias is not None, linear.weight.detach()
    new: Any
    if mode == "bnb.int8":
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_bias, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        settings: dict[str, Any] = {"quant_type": mode[4:7], "compress_statistics": mode.endswith("-dq")}
        shape = linear.in_features, linear.out_features
        new = bnb.nn.Linear4bit(*shape, has_bias, compute_dtype=weight.dtype, **settings)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, **settings)
    if has_bias:
        new.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return new


def saved_bytes(config: Config, mode: str | None, dtype: torch.dtype) -> int:
    """Return the bytes that quantising saves for a model in `dtype`."""
    if mode is None:
        return 0
    with torch.device("meta"):
        blocks = GPT(config).transformer.h
    n = sum(linear.weight.numel() for linear in blocks.modules() if isinstance(linear, nn.Linear))
    return round(n * (dtype.itemsize - BITS[mode] / 8))
