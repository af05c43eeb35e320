"""A distillation loss: the Rényi divergence (Rényi, Proc. 4th Berkeley Symposium, 1961)."""

from __future__ import annotations

import torch

from litgpt_whittle import UserError


def renyi(student: torch.Tensor, teacher: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """Return log Σ p^α q^(1 - α) / (α - 1) in nats for the teacher's p and the student's q; as α → 1, forward KL.

    Args:
        student: Log-probabilities, shape (N, V).
        teacher: Log-probabilities, shape (N, V).
        alpha: Order, between 0 and 1; smaller values weaken the penalty on mass where the teacher has none.

    Returns:
        Loss per token, shape (N,).
    """
    if not 0 < alpha < 1:
        raise UserError(f"renyi's alpha must be between 0 and 1, got {alpha}; 0.5 weighs both alike")
    return torch.logsumexp(alpha * teacher + (1 - alpha) * student, dim=-1) / (alpha - 1)
