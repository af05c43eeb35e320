"""What may shrink in a search, how far and in which steps: the `search_space` section of `litgpt search`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class SizeArgs:
    """One number for every dimension of the search space"""

    n_embd: int = 1
    """Channels of the residual stream"""
    n_layer: int = 1
    """Layers"""
    head_size: int = 1
    """Dimensions of each head"""
    n_query_groups: int = 1
    """Query groups of a layer (heads, where each has its own keys and values)"""
    heads_per_group: int = 1
    """Query heads within each group"""
    intermediate_size: int = 1
    """Neurons of an MLP"""
    moe_intermediate_size: int = 1
    """Neurons of an expert, for teachers that set it"""
    n_expert: int = 1
    """Experts of a layer"""


@dataclass
class SpaceArgs:
    """What may shrink, how far and in which steps"""

    step: SizeArgs = field(default_factory=SizeArgs)
    """Sizes are multiples of these; the teacher's own size is always among them"""
    smallest: SizeArgs = field(default_factory=SizeArgs)
    """The smallest size to consider"""
    fixed: list[str] = field(default_factory=lambda: ["head_size"])
    """Dimensions that stay at the teacher's size, by their names in `step`"""
    layers: Literal["any", "first"] = "any"
    """Whether any layers may be kept, in order, or the first ones only"""
