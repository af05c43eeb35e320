"""What a candidate is scored by: its perplexity on fixed validation batches, as it is cut or repaired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from litgpt.model import GPT

from litgpt_whittle.batches import Batch
from litgpt_whittle.head import HeadInput, HeadTap, head_loss, tap_head
from litgpt_whittle.quick_repair import QuickRepair
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT

FORWARD_TOKENS = {"cpu": 2048}
"""Tokens per forward pass. More are no faster on a CPU, and their activations take memory for nothing."""


class Fitness(Protocol):
    """What candidates are scored by, found by its name in the entry-point group `litgpt_whittle.fitness`.

    It is made of the teacher, the batches that score all candidates, and a function that gives the context to compute
    in, as `Fabric.autocast` does. One that has a class attribute `n_calibration` is also given so many training tokens,
    as `calibration`, shape (N, T); one whose class attribute `needs_importance` is true the teacher's `Ranking`, as
    `importance`.
    """

    name: str
    """Which of the scores counts; lower is better"""
    model: SuperGPT
    batches: Sequence[Batch]
    n_tokens: int
    """Tokens that score each candidate"""

    def __init__(self, model: SuperGPT, batches: Sequence[Batch], autocast: Any = nullcontext) -> None: ...

    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Scores a sub-network, by one or more names."""


class Perplexity:
    """exp(total negative log-likelihood / total tokens), the same batches for all candidates.

    Args:
        model: The teacher.
        batches: What to predict; kept on the model's device.
        autocast: Gives the context to compute in, as `Fabric.autocast` does.
    """

    name = "perplexity"

    def __init__(self, model: SuperGPT, batches: Sequence[Batch], autocast: Any = nullcontext) -> None:
        self.model, self.autocast = model, autocast
        self.batches = [Batch(*(tensor.to(model.lm_head.weight.device) for tensor in batch)) for batch in batches]
        self.n_tokens = sum(batch.n_tokens for batch in batches)

    @torch.inference_mode()
    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Scores a sub-network: `perplexity` and `nll`, its logarithm (nats per token)."""
        # the weights are sliced once; while it runs as a sub-network, the super-network calls the head of a model
        # without weights of its own
        with self.model.running(subnet, materialize=True):
            return self._score(self.model, self.model._running.module)

    def _score(self, model: GPT, owner_of_head: GPT) -> dict[str, float]:
        """The perplexity of a model on all batches."""
        nll = self._mean_loss(model, owner_of_head)
        return {"perplexity": math.exp(nll) if nll < 700 else math.inf, "nll": nll}

    def _mean_loss(self, model: GPT, owner_of_head: GPT) -> float:
        """A model's loss per token of all batches, the logits made in chunks that are thrown away."""
        tap = tap_head(owner_of_head)
        context: AbstractContextManager = self.autocast()
        with context:
            total = sum(self._loss(model, tap, batch).double() * batch.n_tokens for batch in self.batches)
        return float(total) / self.n_tokens

    def _loss(self, model: GPT, tap: HeadTap, batch: Batch) -> torch.Tensor:
        """The mean over one batch's tokens."""
        caught = self._caught(model, tap, batch.input_ids)
        return head_loss(caught, batch.targets, softcap=model.config.final_logit_softcapping).ce

    def _caught(self, model: GPT, tap: HeadTap, input_ids: torch.Tensor) -> HeadInput:
        """What a model's head is called with."""
        n_rows, n_tokens = input_ids.shape
        if (most := FORWARD_TOKENS.get(input_ids.device.type)) is not None:
            n_rows = max(most // n_tokens, 1)
        hidden = []
        for rows in input_ids.split(n_rows):
            tap.tapping = True
            model(rows)
            caught, tap.caught = tap.caught, None
            assert caught is not None, "the sub-network's forward did not reach its head"
            hidden.append(caught.hidden)
        tap.tapping = False
        return caught._replace(hidden=torch.cat(hidden))


class RepairedPerplexity(Perplexity):
    """The perplexity of a candidate after a quick repair (`litgpt_whittle.quick_repair`).

    Args:
        model: The teacher.
        batches: What to predict.
        autocast: Gives the context to compute in.
        calibration: Training tokens to repair on, shape (N, T).
    """

    name = "repaired_perplexity"
    n_calibration = 32_768

    def __init__(
        self, model: SuperGPT, batches: Sequence[Batch], autocast: Any = nullcontext, *, calibration: torch.Tensor
    ) -> None:
        super().__init__(model, batches, autocast)
        self.repair = QuickRepair(model, calibration)

    @torch.inference_mode()
    def __call__(self, subnet: SubNet) -> dict[str, float]:
        """Scores a sub-network: the repaired student's `repaired_perplexity` and `nll`."""
        student = self.repair.student(subnet)
        scores = self._score(student, student)
        return {self.name: scores["perplexity"], "nll": scores["nll"]}
