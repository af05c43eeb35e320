"""Outputs of the commands as objects, for the Python API and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle.checkpoint import WEIGHTS, check_checkpoint, load_model, read_model_class, read_weights
from litgpt_whittle.command_config import Result
from litgpt_whittle.errors import UserError
from litgpt_whittle.evaluations import best_of
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.journal import Evaluation
from litgpt_whittle.metrics_log import read_metrics
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.reports.page import table
from litgpt_whittle.reports.report import Findings, as_text
from litgpt_whittle.subnet import SubNet, read_choice
from litgpt_whittle.supergpt import is_tied

if TYPE_CHECKING:
    from litgpt import LLM


@dataclass(frozen=True)
class RankResult(Result):
    """Output folder of `litgpt rank`."""

    ranking: Ranking


@dataclass(frozen=True)
class SearchResult(Result):
    """Output folder of `litgpt search`."""

    teacher: Path | None = None
    """The teacher's checkpoint directory"""

    @cached_property
    def findings(self) -> Findings:
        """The search's evaluations and journal header."""
        return Findings.read(self.folder)

    @property
    def bests(self) -> dict[str, Evaluation]:
        """The best evaluation of each bin."""
        return best_of(self.findings.evaluations, self.findings.score)

    @property
    def best(self) -> Evaluation:
        """The best evaluation; if there are several bins, that of the first bin."""
        return next(iter(self.bests.values()))

    @property
    def subnet(self) -> SubNet:
        """The sub-network of `best`."""
        return SubNet.from_dict(self.findings.teacher, self.best.subnet)

    @property
    def best_path(self) -> Path:
        """Path of the YAML file of `best`.

        Raises:
            UserError: If there are several bins.
        """
        if len(self.bests) > 1:
            raise UserError(f"the search had {len(self.bests)} bins; name one of {str(self.folder)!r}/best-*.yaml")
        return self.folder / "best.yaml"

    def __str__(self) -> str:
        return as_text(self.findings.bests)

    def _repr_html_(self) -> str:
        """Return the table as HTML for notebooks."""
        return table(self.findings.bests)


@dataclass(frozen=True)
class Checkpoint(Result):
    """A litgpt checkpoint, such as `litgpt extract` writes."""

    @property
    def config(self) -> Config:
        """litgpt's config, padded to the widest layer if layers differ."""
        return check_checkpoint(self.folder)

    @property
    def origin(self) -> dict[str, Any]:
        """Provenance of the sub-network, recorded by `litgpt extract`; empty if unknown."""
        path = self.folder / "sub_network.yaml"
        return (read_choice(path).get("provenance") or {}) if path.is_file() else {}

    @property
    def n_params(self) -> int:
        """Number of parameters in the true shape, with a tied matrix counted once."""
        config, shape = self.config, read_model_class(self.folder).get("shape")
        whole = SubNet.full(config) if shape is None else SubNet.from_dict(config, shape)
        return n_params(config, whole, is_tied(read_weights(self.folder)))

    @property
    def calibration_tokens(self) -> int:
        """Number of calibration tokens of the repair; 0 if the student was not repaired."""
        return (self.origin.get("repair") or {}).get("tokens", 0)

    def load(self) -> GPT:
        """Load the model with its weights."""
        return load_model(self.folder)

    def llm(self) -> LLM:
        """Load the checkpoint as litgpt's `LLM`, which generates text; it needs the tokenizer."""
        from litgpt import LLM

        return LLM.load(str(self.folder))


@dataclass(frozen=True)
class TrainingResult(Result):
    """Output folder of `litgpt distill` or `litgpt pretrain_supernet`."""

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(token count, validation loss) pairs in order of training; losses are in nats per token."""
        return [(row["tokens"], row["val_loss"]) for row in self.rows if "val_loss" in row]

    @property
    def val_loss(self) -> float:
        """The last validation loss, in nats per token.

        Raises:
            UserError: If no validation loss has been logged yet.
        """
        if not self.curve:
            raise UserError(f"{str(self.folder)!r} has no validation loss; name the out_dir of a training that ended")
        return self.curve[-1][1]

    @property
    def perplexity(self) -> float:
        """The last validation perplexity."""
        return math.exp(self.val_loss)

    @property
    def teacher_val_loss(self) -> float | None:
        """The teacher's validation loss on the same batches, in nats per token; None if not measured."""
        return next((row["teacher_val_loss"] for row in self.rows if "teacher_val_loss" in row), None)

    @property
    def checkpoint(self) -> Checkpoint:
        """The trained model."""
        return Checkpoint(self.folder / "final")

    @property
    def is_finished(self) -> bool:
        """True if training has ended and its model is saved."""
        return (self.folder / "final" / WEIGHTS).is_file()


@dataclass(frozen=True)
class Checkpoints(Result):
    """Students that `litgpt extract` cut from the best sub-networks of a search's folder, one per bin."""

    students: Sequence[Checkpoint]


@dataclass(frozen=True)
class WhittleResult(Result):
    """Output folder of `litgpt whittle`."""

    students: Sequence[TrainingResult]
    """The trained students, in the order of the targets"""


def searched_perplexity(origin: Mapping[str, Any]) -> float | None:
    """Return the perplexity that a search recorded in a sub-network's provenance; None if it recorded none.

    If the search repaired its candidates, it is the perplexity after the repair.
    """
    return origin.get("repaired_perplexity", origin.get("perplexity"))


def tokens_to_reach(curve: Sequence[tuple[int, float]], loss: float) -> int | None:
    """Return the first token count at which the loss (nats per token) is at most `loss`; None if there is none."""
    return next((tokens for tokens, value in curve if value <= loss), None)
