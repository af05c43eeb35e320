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
    """Validation batches that score candidates"""

    micro_batch_size: int = 4
    """Number of samples per forward pass"""
    max_seq_length: int | None = None
    """Length of samples; by default the teacher's block size, up to 2048"""

    def __post_init__(self) -> None:
        check_positive("train", micro_batch_size=self.micro_batch_size, max_seq_length=self.max_seq_length)


@dataclass
class BudgetArgs:
    """Amount of validation data per candidate"""

    max_iters: int = 32
    """Validation batches per candidate"""

    def __post_init__(self) -> None:
        check_positive("eval", max_iters=self.max_iters)


@dataclass
class RacingArgs:
    """Early stopping of candidates with significantly worse losses"""

    start: int = 1
    """Validation batches of the first stage, which scores every candidate"""
    growth: float = 2.0
    """Growth factor of the number of validation batches per stage"""
    alpha: float = 0.05
    """Significance level of the test that drops a candidate for being worse than the worst one to keep"""

    def __post_init__(self) -> None:
        check_positive("racing", start=self.start)
        if not self.growth > 1:
            raise UserError(f"racing.growth must be more than 1, got {self.growth}; 2 doubles what is seen each time")
        if not 0 < self.alpha < 1:
            raise UserError(f"racing.alpha must be between 0 and 1, got {self.alpha}; 0.05 is usual")


@dataclass
class SelectionArgs:
    """Selection among the best candidates of a search by short distillations"""

    rungs: list[str] = field(default_factory=list)
    """Students x tokens per rung, with fewer students and more tokens each time, such as [8x200k, 2x1M]; by default the
    best score wins"""
    config: Path | None = None
    """YAML config of litgpt distill for their training: data, batch sizes, optimizer and losses"""
    repair: bool = True
    """If true, repair students before training"""


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
    """Query groups of a layer (heads, if each has its own keys and values)"""
    heads_per_group: int = 1
    """Query heads within each group"""
    intermediate_size: int = 1
    """Neurons of an MLP"""
    moe_intermediate_size: int = 1
    """Neurons of an expert, for teachers that set it"""
    n_expert: int = 1
    """Experts of a layer"""


@dataclass
class StepArgs(SizeArgs):
    """Steps of the dimensions. By default one unit, and 32 to 128 for the widths of teachers with at least 512
    channels, since GPUs multiply matrices of odd widths slowly and quantisers refuse them"""

    n_embd: int | None = None
    """Channels of the residual stream; by default 128 for more than 2,048, else 64 or 32, if it divides the teacher's
    and leaves 16 sizes"""
    intermediate_size: int | None = None
    """Neurons of an MLP; by default as for channels"""
    moe_intermediate_size: int | None = None
    """Neurons of an expert; by default as for channels"""


@dataclass
class SpaceArgs:
    """Dimensions that may shrink, with their smallest sizes and steps"""

    step: StepArgs = field(default_factory=StepArgs)
    """Step of each dimension: sizes are its multiples; the teacher's own size is always allowed"""
    smallest: SizeArgs = field(default_factory=SizeArgs)
    """Smallest size of each dimension"""
    fixed: list[str] = field(default_factory=lambda: ["head_size"])
    """Dimensions that stay at the teacher's size, by their names in `step`"""
    layers: Literal["any", "first", "best"] = "any"
    """Layers to keep: any, in their order; only the first ones; or only the most important ones (best)"""
    convertible: bool | None = None
    """If true, the heads fit within the channels and can be padded to fill them, as transformers' classes for Pythia
    (GPT-NeoX), StableLM and Falcon require: `n_embd` stays a multiple of the teacher's `head_size`. By default true for
    a search with such a teacher, else false"""


@dataclass
class LimitArgs:
    """Limits on the costs of sub-networks: a maximum (800M) or a range (600M-800M)"""

    n_params: str | int | float | None = None
    """Parameters. Without ``--bin``, candidates are built to this range as to a bin"""
    flops: str | int | float | None = None
    """FLOPs per token of a forward pass, as in 1.5G"""
    kv_cache_bytes: str | int | float | None = None
    """Bytes of the KV cache of one sequence in bfloat16, as in 64MiB"""
    weight_bytes: str | int | float | None = None
    """Bytes of the weights in bfloat16, as in 2GB"""
    latency_prefill: str | int | float | None = None
    """Seconds from a prompt to the first new token on this machine, as in 50ms. Candidates are timed before scoring,
    which takes some seconds for a large one; one that is too slow is not scored, but counts as an evaluation"""
    latency_decode: str | int | float | None = None
    """Seconds for each further token on this machine, as in 5ms; measured together with the other latency"""

    def __post_init__(self) -> None:
        self.ranges()

    def ranges(self) -> dict[str, Range]:
        """Return the limits that are set, by name.

        Raises:
            UserError: If a limit cannot be parsed.
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
    """Predictor of candidates' scores, which reduces the number of evaluations"""

    mode: Literal["none", "filter", "objective"] = "none"
    """With filter, the strategy proposes several candidates per evaluation, and the one with the best prediction is
    evaluated. With objective, the strategy searches on predictions; the best candidates are evaluated, the surrogate is
    fitted to them, and the search repeats"""
    kind: str = "trees"
    """Regressor, by its name in `litgpt_whittle.surrogates`: trees (a forest on features of sub-networks), or text (a
    language model that reads a description of them)"""
    path: Path | None = None
    """Another search's folder or journal, of any teacher and data, to pretrain on"""
    importance: Path | None = None
    """The teacher's `importance.pt` of `litgpt rank`: adds the kept shares of its scores as features"""
    n_initial: int = 20
    """Evaluations before the first predictions, if no `path` is given"""
    refit: float = 0.1
    """Relative growth of the number of evaluations between two fits, with filter; at least ten evaluations"""
    n_proposals: int = 30
    """Candidates proposed per evaluation, with filter"""
    optimism: float = 1.0
    """κ in the lower confidence bound μ − κσ that ranks candidates: of equal predictions it prefers the most uncertain,
    which makes a search explore. No effect for regressors without a standard deviation"""
    n_inner: int = 500
    """Predictions per search on predictions, with objective"""
    n_evaluated: int = 10
    """Candidates to evaluate after each search on predictions, with objective"""
    model: str | None = None
    """Folder or name of a Hugging Face model for sequence classification, such as the folder `surrogate` that a search
    with kind text writes. For kind text"""
    epochs: int = 10
    """Training epochs per fit. For kind text"""
    learning_rate: float = 5e-5
    """Peak learning rate, reached after a tenth of the steps. For kind text"""

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
    """Raise UserError unless all settings are whole numbers of at least 1; None is allowed."""
    for name, value in values.items():
        if value is not None and not (is_number(value) and value >= 1 and value == int(value)):
            is_small = is_number(value) and value < 1
            raise UserError(
                f"{section}.{name} must be {'' if is_small else 'a whole number, '}at least 1, got {value!r}"
            )


def check_shares(section: str, **values: float) -> None:
    """Raise UserError unless all settings are numbers between 0 and 1."""
    for name, value in values.items():
        if not (is_number(value) and 0 <= value <= 1):
            raise UserError(f"{section}.{name} must be between 0 and 1, got {value!r}")


def is_number(value: Any) -> bool:
    """Return whether a setting is a finite number; settings of plugins are not type-checked by the parser."""
    return isinstance(value, int | float) and math.isfinite(value)
