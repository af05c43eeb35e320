"""Tasks with their documents and tokens, to be scored on any number of models of one tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from litgpt.model import GPT
from tqdm import tqdm

from litgpt_whittle.batches import fingerprint
from litgpt_whittle.tasks.args import Score
from litgpt_whittle.tasks.batches import Continuation, task_batches
from litgpt_whittle.tasks.scoring import log_likelihoods

LOSS = "task_loss"
"""Name of the score that a search minimises"""

LogLikelihood = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether each of its tokens is the most likely one"""


@dataclass(frozen=True)
class Document:
    """A document of a task, and the continuations that answer it.

    `task` is an lm-eval task, whose `process_results` returns the accuracy.
    """

    task: Any
    doc: Any
    """The document in lm-eval's form"""
    metric: str
    """Name of the accuracy among the task's metrics: `acc` or `acc_norm`"""
    continuations: range
    """Indices of the continuations"""
    n_chars: np.ndarray
    """Characters by which the log-likelihood of each continuation is divided for the margin, shape (n,)"""
    is_correct: np.ndarray
    """True for correct answers, shape (n,)"""

    def accuracy(self, found: Sequence[LogLikelihood]) -> float:
        """Return lm-eval's accuracy for the log-likelihoods of this document's continuations, between 0 and 1."""
        return float(self.task.process_results(self.doc, [*found])[self.metric])

    def margin(self, found: Sequence[LogLikelihood]) -> float:
        """Return the margin of the best correct answer over the best wrong one, in nats per character.

        With a single continuation, its log-likelihood per character. 0 if there is no correct answer.
        """
        scores = np.array([log_likelihood for log_likelihood, _ in found]) / self.n_chars
        if not self.is_correct.any():
            return 0.0
        best = float(scores[self.is_correct].max())
        return best if self.is_correct.all() else best - float(scores[~self.is_correct].max())


@dataclass(frozen=True)
class Task:
    """A task or a group of tasks, as the user names it."""

    name: str
    documents: Sequence[Document]


@dataclass(frozen=True)
class TaskResult:
    """A model's result on one task."""

    name: str
    n_documents: int
    accuracy: float
    """Mean accuracy, between 0 and 1"""
    stderr: float
    """Standard error of the accuracy; 0 for a single document"""
    margin: float
    """Mean margin, in nats per character"""

    @classmethod
    def of(cls, task: Task, found: Sequence[LogLikelihood]) -> TaskResult:
        """Return the result for the log-likelihoods of all continuations of the task's set."""
        own = [(each, found[each.continuations.start : each.continuations.stop]) for each in task.documents]
        accuracies = [document.accuracy(answers) for document, answers in own]
        n = len(accuracies)
        stderr = stdev(accuracies) / math.sqrt(n) if n > 1 else 0.0
        return cls(task.name, n, mean(accuracies), stderr, mean(document.margin(answers) for document, answers in own))


class TaskSet:
    """Tasks whose continuations are tokenised and packed into batches once.

    Args:
        tasks: The tasks; their documents index `continuations`.
        continuations: Tokens to score, and the tokens before them.
        max_length: Maximum length of a model's input.
        score: Mean over tasks that a search maximises.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        continuations: Sequence[Continuation],
        max_length: int,
        score: Score = "margin",
    ) -> None:
        self.tasks, self.n_continuations, self.score = tasks, len(continuations), score
        self.batches = task_batches(continuations, max_length)

    @property
    def n_input_tokens(self) -> int:
        """Number of tokens that a model reads, padding included."""
        return sum(batch.input_ids.numel() for batch in self.batches)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokens and of the correct answers: sixteen hex digits."""
        answers = [tuple(torch.from_numpy(each.is_correct) for each in task.documents) for task in self.tasks]
        return fingerprint([*self.batches, *answers])

    def results(self, found: Sequence[LogLikelihood]) -> list[TaskResult]:
        """Return the result of each task for the log-likelihoods of all continuations."""
        return [TaskResult.of(task, found) for task in self.tasks]

    def scores(self, results: Sequence[TaskResult]) -> dict[str, float]:
        """Return scores by name: the loss to minimise, the means over tasks, and the accuracies of several tasks."""
        means = {name: mean(getattr(each, name) for each in results) for name in ("accuracy", "margin")}
        loss = 1 - means["accuracy"] if self.score == "accuracy" else -means["margin"]
        each = {f"accuracy.{result.name}": result.accuracy for result in results} if len(results) > 1 else {}
        return {LOSS: loss, **means, **each}

    def measure(self, model: GPT, title: str = "measuring tasks") -> list[TaskResult]:
        """Return a model's result on each task, with a progress bar."""
        device = model.lm_head.weight.device
        bar = tqdm(self.batches, desc=title, unit="batch", leave=False, dynamic_ncols=True)
        return self.results(log_likelihoods(model, (batch.to(device) for batch in bar), self.n_continuations))
