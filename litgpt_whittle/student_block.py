"""Blocks of students, which may lack their attention or their MLP."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from litgpt.model import Block
from torch import nn

from litgpt_whittle.index_plan import SUBLAYERS, dropped_modules
from litgpt_whittle.subnet import SubNet


class NoSublayer(nn.Module):
    """Replacement for a dropped attention or MLP; its output is zero, which litgpt's forward of the block adds."""

    kv_cache: None = None

    def forward(self, x: torch.Tensor, *args: object) -> torch.Tensor:
        return x.new_zeros(()).expand_as(x)  # a view, which takes no memory

    def build_kv_cache(self, *args: object) -> None:
        """Return None, since litgpt requests a cache from the attention of every block."""


def student_block(subnet: SubNet, index: int) -> Block:
    """Return litgpt's block for the student's layer `index` in its true shape, with newly initialised weights."""
    return _keep_parts(Block(subnet.layer_config(index), index), subnet.layer(index).parts)


def part_of(block: Block, part: str) -> Block:
    """Return a copy of a block with only its attention (`attn`) or only its MLP (`mlp`), which shares the weights."""
    half = copy.copy(block)
    half._modules = dict(block._modules)
    return _keep_parts(half, (part,))


def _keep_parts(block: Block, parts: Collection[str]) -> Block:
    for name in dropped_modules(block.config, parts):
        setattr(block, name, NoSublayer() if name in SUBLAYERS else nn.Identity())
    return block
