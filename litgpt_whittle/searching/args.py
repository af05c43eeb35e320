"""Argument groups of `litgpt search`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from litgpt_whittle.amounts import Range
from litgpt_whittle.errors import UserError
from litgpt_whittle.metrics import MEASURES


@dataclass
class BatchArgs:
    """How candidates see the validation data"""

    micro_batch_size: int = 4
    """Number of samples per forward pass"""
    max_seq_length: int | None = None
    """Length of samples; by default the teacher's block size, but at most 2048"""

    def __post_init__(self) -> None:
        check_positive("train", micro_batch_size=self.micro_batch_size, max_seq_length=self.max_seq_length)


@dataclass
class BudgetArgs:
    """How much of the validation data candidates see"""

    max_iters: int = 32
    """Validation batches per candidate"""

    def __post_init__(self) -> None:
        check_positive("eval", max_iters=self.max_iters)


@dataclass
class RacingArgs:
    """How soon candidates that fall behind are dropped"""

    start: int = 1
    """Validation batches that every candidate sees"""
    growth: float = 2.0
    """How many times as many those that are left have seen after each further stage"""
    alpha: float = 0.05
    """How likely it may be that a candidate is dropped that is as good as the worst one to keep"""

    def __post_init__(self) -> None:
        check_positive("racing", start=self.start)
        if not self.growth > 1:
            raise UserError(f"racing.growth must be more than 1, got {self.growth}; 2 doubles what is seen each time")
        if not 0 < self.alpha < 1:
            raise UserError(f"racing.alpha must be between 0 and 1, got {self.alpha}; 0.05 is usual")


@dataclass
class SelectionArgs:
    """How the best of a search are chosen among by short distillations"""

    rungs: list[str] = field(default_factory=list)
    """Students x tokens, fewer and longer each time, such as [8x200k, 2x1M]; by default the best score wins"""
    config: Path | None = None
    """A YAML file of litgpt distill to train them with: its data, batch sizes, optimizer and losses"""
    repair: bool = True
    """Whether students are repaired before they are trained"""


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
    layers: Literal["any", "first", "best"] = "any"
    """Whether any layers may be kept, in order, the first ones only, or the most important ones only"""
    convertible: bool | None = None
    """Whether heads take no more than the channels and may fill them, as transformers' classes for Pythia (GPT-NeoX),
    StableLM and Falcon ask for: `n_embd` stays a multiple of the teacher's `head_size`. By default, a search for
    students of such a teacher keeps to it, nothing else does"""


@dataclass
class LimitArgs:
    """What sub-networks may cost: at most so much (800M), or at least and at most (600M-800M)"""

    n_params: str | int | float | None = None
    """Parameters. Where there is no ``--bin``, candidates are built to them as to a bin"""
    flops: str | int | float | None = None
    """FLOPs per token of a forward pass, as in 1.5G"""
    kv_cache_bytes: str | int | float | None = None
    """Bytes of the KV cache of one sequence in bfloat16, as in 64MiB"""
    weight_bytes: str | int | float | None = None
    """Bytes of the weights in bfloat16, as in 2GB"""
    latency_prefill: str | int | float | None = None
    """Seconds from a prompt to the first new token on this machine, as in 50ms. Every candidate is timed before it is
    scored, which takes some seconds for a large one; one that is too slow is not scored, but counts as an evaluation"""
    latency_decode: str | int | float | None = None
    """Seconds for each further token on this machine, as in 5ms; taken like the other latency, both in one go"""

    def __post_init__(self) -> None:
        self.ranges()

    def ranges(self) -> dict[str, Range]:
        """The limits that there are.

        Raises:
            UserError: If one cannot be read.
        """
        found = {}
        for name, text in vars(self).items():
            try:
                found |= {} if text is None else {name: MEASURES[name].parse(text)}
            except UserError as error:
                raise UserError(f"limit.{name}: {error}") from None
        return found


@dataclass
class SurrogateArgs:
    """What predicts the scores of candidates, so that fewer of them need be evaluated"""

    mode: Literal["none", "filter", "objective"] = "none"
    """With filter, the strategy proposes several candidates for each one evaluated: the one with the best prediction.
    With objective, it searches on predictions alone, the best few are evaluated and learnt from, and so on"""
    kind: str = "trees"
    """What predicts, by its name in `litgpt_whittle.surrogates`: trees (a forest on features of sub-networks), or text
    (a language model that reads a description of them)"""
    path: Path | None = None
    """Another search's folder or journal, of any teacher and data, to learn from beforehand"""
    importance: Path | None = None
    """The teacher's `importance.pt` of `litgpt rank`: the shares of its scores that are kept become features too"""
    n_initial: int = 20
    """Evaluations before the first predictions, where there is no `path`"""
    refit: float = 0.1
    """The share by which the evaluations grow until it is fitted anew, with filter; it is never less than ten"""
    n_proposals: int = 30
    """Candidates proposed for each one evaluated, with filter"""
    optimism: float = 1.0
    """What counts is the prediction less so many times its standard deviation, as far as that is known: of candidates
    that are expected to be alike, the one that is least like any known one, without which a search stays where it is"""
    n_inner: int = 500
    """Predictions that each search on predictions makes, with objective"""
    n_evaluated: int = 10
    """How many of the best are then evaluated, with objective"""
    model: str | None = None
    """A Hugging Face model for sequence classification, its folder or name; what a search with kind text left in its
    folder `surrogate` is one too. For kind text"""
    epochs: int = 10
    """How often it sees each evaluation, whenever it is fitted. For kind text"""
    learning_rate: float = 5e-5
    """The largest one, reached after a tenth of the steps. For kind text"""

    def __post_init__(self) -> None:
        if self.mode not in ("none", "filter", "objective"):
            raise UserError(f"surrogate.mode must be none, filter or objective, got {self.mode!r}")
        numbers = {
            name: getattr(self, name) for name in ("n_initial", "n_proposals", "n_inner", "n_evaluated", "epochs")
        }
        check_positive("surrogate", **numbers)
        for name in ("refit", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"surrogate.{name} must be more than 0, got {getattr(self, name)}")
        if not 0 <= self.optimism < math.inf:
            raise UserError(f"surrogate.optimism must be 0 or more, got {self.optimism}")
        for name in ("path", "importance", "model"):
            if self.mode == "none" and getattr(self, name) is not None:
                raise UserError(f"surrogate.{name} needs a surrogate; add --surrogate.mode filter or leave it out")


def check_positive(section: str, **values: int | None) -> None:
    """Refuses settings that are no whole numbers from 1.

    Raises:
        UserError: If there is one.
    """
    for name, value in values.items():
        if value is not None and not (is_number(value) and value >= 1 and value == int(value)):
            is_small = is_number(value) and value < 1
            raise UserError(
                f"{section}.{name} must be {'' if is_small else 'a whole number, '}at least 1, got {value!r}"
            )


def check_shares(section: str, **values: float) -> None:
    """Refuses settings outside of 0 … 1.

    Raises:
        UserError: If there is one.
    """
    for name, value in values.items():
        if not (is_number(value) and 0 <= value <= 1):
            raise UserError(f"{section}.{name} must be between 0 and 1, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number; settings of parts that are found by name come with no types."""
    return isinstance(value, int | float) and math.isfinite(value)
