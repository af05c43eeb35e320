"""What a student learns from at some point of its training: which losses, with which weights, at which temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from litgpt_whittle.distillation.losses import Loss, forward_kl, wide


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
    """What a cached teacher knows of its distributions for n tokens: the probabilities of some tokens each."""

    ids: torch.Tensor
    """Token ids, int64, shape (n, K); all different for a token where there is a tail"""
    log_p: torch.Tensor
    """Their log-probabilities, at least fp32, shape (n, K); -inf for places that are not used"""
    log_tail: torch.Tensor | None
    """The log-probability of all other tokens together, shape (n, 1); None where the known ones are samples"""

    def to(self, dtype: torch.dtype) -> SparseTargets:
        """The same in another precision."""
        return SparseTargets(self.ids, self.log_p.to(dtype), None if self.log_tail is None else self.log_tail.to(dtype))

    def split(self, n: int) -> list[SparseTargets]:
        """About n tokens each, and the rest, as `torch.Tensor.split`."""
        ids, log_p = self.ids.split(n), self.log_p.split(n)
        log_tail = [None] * len(ids) if self.log_tail is None else self.log_tail.split(n)
        return [SparseTargets(*parts) for parts in zip(ids, log_p, log_tail)]


def log_probabilities(
    logits: torch.Tensor, teacher: torch.Tensor | SparseTargets, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both tempered distributions over the same events, as logarithms.

    The events are the vocabulary, or the tokens that are known of the teacher and one that stands for all others.

    Args:
        logits: The student's, shape (n, V).
        teacher: Its logits, shape (n, V), or what is known of its distribution at this temperature.
        temperature: Divides logits.

    Returns:
        The student's and the teacher's, shape (n, V) or (n, K + 1).
    """
    student = torch.log_softmax(logits / temperature, dim=-1)
    if isinstance(teacher, torch.Tensor):
        return student, torch.log_softmax(wide(teacher) / temperature, dim=-1)
    known = student.gather(1, teacher.ids)
    if teacher.log_tail is None or teacher.ids.size(1) == logits.size(1):
        return known, teacher.log_p
    return torch.cat((known, log_rest(student, teacher.ids)), 1), torch.cat((teacher.log_p, teacher.log_tail), 1)


def log_rest(log_p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The log-probability of all tokens but some, shape (n, 1).

    Args:
        log_p: Log-probabilities, shape (n, V).
        ids: The tokens that are left out, shape (n, K).
    """
    rest = log_p.scatter(1, ids, -torch.inf)
    is_empty = (rest == -torch.inf).all(-1, keepdim=True)  # where logsumexp has no gradient
    return rest.masked_fill(is_empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(is_empty, -torch.inf)
