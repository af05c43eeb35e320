"""The distillation objective at one point of the training: losses, weights and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from litgpt_whittle.distillation.losses import (
    Loss,
    forward_kl,
)
from litgpt_whittle.errors import UserError
from litgpt_whittle.tensors import upcast


class Term(NamedTuple):
    """One distance between the teacher's and the student's predictions."""

    loss: Loss
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """loss = alpha · CE + beta · T² · Σ weight · loss(teacher, student).

    T² keeps the gradient's size when the temperature changes (Hinton et al.).
    """

    alpha: float = 1.0
    beta: float = 0.0
    temperature: float = 1.0
    terms: tuple[Term, ...] = (Term(forward_kl),)


class SparseTargets(NamedTuple):
    """A teacher's distributions for n tokens, each with the probabilities of only K vocabulary entries."""

    ids: torch.Tensor
    """Token ids, int64, shape (n, K); distinct within a row if there is a tail"""
    log_p: torch.Tensor
    """Their log-probabilities, at least fp32, shape (n, K); -inf for unused entries"""
    log_tail: torch.Tensor | None
    """Log-probability of all other tokens together, shape (n, 1); None if the entries are samples"""

    def to(self, dtype: torch.dtype) -> SparseTargets:
        """Return the targets with another floating-point dtype."""
        return SparseTargets(self.ids, self.log_p.to(dtype), None if self.log_tail is None else self.log_tail.to(dtype))

    def split(self, n: int) -> list[SparseTargets]:
        """Split into parts of n tokens, the last possibly smaller, like `torch.Tensor.split`."""
        ids, log_p = self.ids.split(n), self.log_p.split(n)
        log_tail = [None] * len(ids) if self.log_tail is None else self.log_tail.split(n)
        return [SparseTargets(*parts) for parts in zip(ids, log_p, log_tail)]


def check_losses(terms: Sequence[Term], gives: str, where: str) -> None:
    """Check that the losses can learn from the teacher's targets.

    Args:
        terms: The losses.
        gives: Kind of the targets (`litgpt_whittle.distillation.codecs.Codec.gives`).
        where: Name of the targets' source in messages.

    Raises:
        UserError: For the first loss that cannot learn from targets of this kind.
    """
    for loss in (term.loss for term in terms):
        name = getattr(loss, "__name__", repr(loss))
        if gives != "logits" and getattr(loss, "on_logits", False):
            raise UserError(
                f"{name} needs all logits, got only {gives} from the {where}; choose a loss of probabilities such as "
                "forward_kl, or cache the teacher with --codec full"
            )
        if gives == "samples" and not getattr(loss, "is_linear", False):
            raise UserError(
                f"{name} is biased on the samples of the {where}; choose forward_kl or soft_cross_entropy, or cache "
                "the teacher with --codec top_k"
            )


def log_probabilities(
    logits: torch.Tensor, teacher: torch.Tensor | SparseTargets, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of both tempered distributions over the same events.

    The events are the vocabulary, or for sparse targets the teacher's known tokens and one event for all others.

    Args:
        logits: The student's logits, shape (n, V).
        teacher: The teacher's logits, shape (n, V), or its sparse targets at this temperature.
        temperature: Divides logits.

    Returns:
        The student's and the teacher's log-probabilities, each of shape (n, V). For sparse targets: (n, K + 1), or
            (n, K) without a tail.
    """
    student = torch.log_softmax(logits / temperature, dim=-1)
    if isinstance(teacher, torch.Tensor):
        return student, torch.log_softmax(upcast(teacher) / temperature, dim=-1)
    known = student.gather(1, teacher.ids)
    if teacher.log_tail is None or teacher.ids.size(1) == logits.size(1):
        return known, teacher.log_p
    return torch.cat((known, log_rest(student, teacher.ids)), 1), torch.cat((teacher.log_p, teacher.log_tail), 1)


def log_rest(log_p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of all tokens except `ids`, shape (n, 1).

    Args:
        log_p: Log-probabilities, shape (n, V).
        ids: The tokens to exclude, shape (n, K).
    """
    rest = log_p.scatter(1, ids, -torch.inf)
    is_empty = (rest == -torch.inf).all(-1, keepdim=True)  # where logsumexp has no gradient
    return rest.masked_fill(is_empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(is_empty, -torch.inf)
