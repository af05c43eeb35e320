"""Argument groups of search spaces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from litgpt_whittle.errors import UserError
from litgpt_whittle.metrics import MEASURES
from litgpt_whittle.quantities import Range
from litgpt_whittle.subnet import DROPS

SUBLAYER_NAMES = {name.removeprefix("drop_"): part for name, part in DROPS.items()}
"""litgpt's names of the sub-layers in `SpaceArgs.drop`"""


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
    """Query groups of a layer (its heads, if each head has its own keys and values)"""
    heads_per_group: int = 1
    """Query heads within each group"""
    intermediate_size: int = 1
    """Neurons of an MLP"""
    moe_intermediate_size: int = 1
    """Neurons of an expert, for teachers whose config sets it"""
    n_expert: int = 1
    """Experts of a layer"""


@dataclass
class StepArgs(SizeArgs):
    """Step of each dimension. By default one unit, but 32 to 128 for the widths of teachers with at least 512
    channels: GPUs multiply matrices of odd widths slowly, and quantisers refuse them"""

    n_embd: int | None = None  # type: ignore[assignment]
    """Channels of the residual stream; by default the largest of 128 (above 2,048 channels), 64 and 32 that divides the
    teacher's number of channels and leaves at least 16 sizes, else 1"""
    intermediate_size: int | None = None  # type: ignore[assignment]
    """Neurons of an MLP; same default rule as `n_embd`"""
    moe_intermediate_size: int | None = None  # type: ignore[assignment]
    """Neurons of an expert; same default rule as `n_embd`"""


@dataclass
class SpaceArgs:
    """Dimensions that may shrink, with their smallest sizes and steps"""

    step: StepArgs = field(default_factory=StepArgs)
    """Step of each dimension: sizes are multiples of it; the teacher's size is also allowed"""
    smallest: SizeArgs = field(default_factory=SizeArgs)
    """Smallest size of each dimension"""
    fixed: list[str] = field(default_factory=lambda: ["head_size"])
    """Dimensions that stay at the teacher's size, by their names in `step`"""
    drop: list[str] = field(default_factory=lambda: ["layer"])
    """Parts that may be dropped: whole layers (`layer`), the attention of kept layers (`attention`), or their MLP
    (`mlp`)"""
    layers: Literal["any", "first", "best"] = "any"
    """Layers to keep: `any` subset in the original order, only the `first` ones, or only the most important (`best`)"""
    convertible: bool | None = None
    """If true, keep sub-networks convertible to transformers' classes for Pythia (GPT-NeoX), StableLM and Falcon:
    `n_embd` stays a multiple of the teacher's `head_size`, and the heads can be padded to fill the channels. By default
    true for a search with such a teacher, else false"""

    @property
    def sublayers(self) -> tuple[str, ...]:
        """Sub-layers that may be dropped, by litgpt's names."""
        return tuple(part for name, part in SUBLAYER_NAMES.items() if name in self.drop)


@dataclass
class LimitArgs:
    """Limits on the costs of sub-networks: a maximum (800M) or a range (600M-800M)"""

    n_params: str | int | float | None = None
    """Number of parameters. Without ``--bin``, this range serves as the bin"""
    flops: str | int | float | None = None
    """FLOPs per token of a forward pass, such as 1.5G"""
    kv_cache_bytes: str | int | float | None = None
    """Bytes of the KV cache of one sequence in bfloat16, such as 64MiB"""
    weight_bytes: str | int | float | None = None
    """Bytes of the weights in bfloat16, such as 2GB"""
    latency_prefill: str | int | float | None = None
    """Seconds from a prompt to the first new token on this machine, such as 50ms. Each candidate is timed before it is
    scored, which takes some seconds if it is large. A candidate that is too slow is not scored, but counts as an
    evaluation"""
    latency_decode: str | int | float | None = None
    """Seconds for each further token on this machine, such as 5ms; measured together with `latency_prefill`"""

    def __post_init__(self) -> None:
        self.ranges()

    def ranges(self) -> dict[str, Range]:
        """Return the limits that are set, by name.

        Raises:
            UserError: If a limit cannot be parsed.
        """
        found: dict[str, Range] = {}
        for name, text in vars(self).items():
            try:
                found |= {} if text is None else {name: MEASURES[name].parse(text)}
            except UserError as error:
                raise UserError(f"limit.{name}: {error}") from None
        return found
