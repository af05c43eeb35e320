"""A distillation loss: the Rényi divergence (Rényi, Proc. 4th Berkeley Symposium, 1961)."""

from __future__ import annotations

import torch

from litgpt_whittle import UserError


def renyi(student: torch.Tensor, teacher: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """log Σ p^α q^(1 - α) / (α - 1) in nats, for the teacher's p and the student's q; near α = 1 it is forward KL.

    Args:
        student: Log-probabilities, shape (N, V).
        teacher: Log-probabilities, shape (N, V).
        alpha: Between 0 and 1; the smaller, the less it costs to put mass where the teacher has none.

    Returns:
        The loss of every token, shape (N,).
    """
    if not 0 < alpha < 1:
        raise UserError(f"renyi's alpha must be between 0 and 1, got {alpha}; 0.5 weighs both alike")
    return torch.logsumexp(alpha * teacher + (1 - alpha) * student, dim=-1) / (alpha - 1)
