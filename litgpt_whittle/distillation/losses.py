"""Distillation losses between a student's and its teacher's predictions.

Each loss is a pure function of the predictions for N tokens and returns one value per token. Its inputs are tempered
log-probabilities over the whole vocabulary, or, with a cached teacher, over the stored tokens and a last entry for all
other tokens together. A loss marked with `on_logits` takes logits. Inputs are fp32 or float64. A token with teacher
probability 0 (logit -inf) contributes nothing; a loss is infinite only if its definition is. The caller applies
T² and the mean over tokens (`litgpt_whittle.distillation.head`). `litgpt distill --distill.loss NAME` finds these
losses, and those of other packages, in the entry-point group `litgpt_whittle.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from litgpt_whittle.errors import UserError

Loss = Callable[..., torch.Tensor]
"""(student (N, V), teacher (N, V)) -> (N,), with settings as keyword arguments. Two attributes may be set on it:

`on_logits`: it takes logits, divided by the temperature, and cannot learn from sparse targets.
`is_linear`: its gradient is linear in the teacher's probabilities, so that unbiased samples of them suffice.
"""


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher ‖ student) in nats (Hinton et al., arXiv 1503.02531)."""
    return _mean(teacher, teacher - student)


forward_kl.is_linear = True  # type: ignore[attr-defined]


def soft_cross_entropy(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return -Σ p log q in nats, for the teacher's p and the student's q; `forward_kl` plus the teacher's entropy."""
    return _mean(teacher, -student)


soft_cross_entropy.is_linear = True  # type: ignore[attr-defined]


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(student ‖ teacher) in nats, which is mode-seeking (arXiv 2306.08543)."""
    return forward_kl(teacher, student)


def symmetric_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean of `forward_kl` and `reverse_kl`."""
    return (forward_kl(student, teacher) + reverse_kl(student, teacher)) / 2


def jensen_shannon(student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """Return the generalised Jensen–Shannon divergence in nats (arXiv 2306.13649): β KL(p ‖ m) + (1 - β) KL(q ‖ m).

    p is the teacher's distribution, q the student's, m = β p + (1 - β) q. At most ln 2.

    Args:
        student: Log-probabilities, shape (N, V).
        teacher: Log-probabilities, shape (N, V).
        beta: The teacher's weight in the mixture, between 0 and 1; 0.5 is the plain divergence.
    """
    if not 0 < beta < 1:
        raise UserError(f"jensen_shannon's beta must be between 0 and 1, got {beta}; 0.5 gives the plain divergence")
    is_empty = (teacher == -math.inf) & (student == -math.inf)  # where logaddexp has no gradient
    ours, theirs = (log_p.masked_fill(is_empty, 0.0) for log_p in (student, teacher))
    mixture = torch.logaddexp(theirs + math.log(beta), ours + math.log1p(-beta))
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


def total_variation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the total variation distance ½ Σ |p - q|, between 0 and 1."""
    return (teacher.exp() - student.exp()).abs().sum(-1) / 2


def cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return 1 - the cosine similarity of the two probability vectors."""
    return 1 - F.cosine_similarity(student.exp(), teacher.exp(), dim=-1)


def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of the logits."""
    return _mean_difference(student, teacher, torch.square)


mse.on_logits = True  # type: ignore[attr-defined]


def l1(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of the logits."""
    return _mean_difference(student, teacher, torch.abs)


l1.on_logits = True  # type: ignore[attr-defined]


def _mean(log_weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return Σ exp(log_weights) · values; entries with weight 0 do not count, even if their value is infinite."""
    weights = log_weights.exp()
    return (weights * values.masked_fill(weights == 0, 0.0)).sum(-1)


def _mean_difference(
    student: torch.Tensor, teacher: torch.Tensor, size: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the mean of `size` of the logits' differences over the tokens whose teacher logit is not -inf."""
    is_impossible = teacher == -math.inf
    sizes = size((student - teacher).masked_fill(is_impossible, 0.0))
    return sizes.sum(-1) / (~is_impossible).sum(-1)
