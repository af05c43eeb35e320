"""Distillation losses: how far a student's logits are from its teacher's.

Pure functions of logits, computed in fp32 (float64 stays), means over tokens. `litgpt distill --distill.loss NAME`
finds them, and those of other packages, in the entry-point group `litgpt_whittle.losses`. A loss leaves T² to its
caller (`head.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100

Loss = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(student logits (N, V), teacher logits (N, V), temperature) -> mean over the N tokens."""


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher ‖ student) of the tempered distributions, in nats (Hinton et al., arXiv 1503.02531).

    Args:
        student_logits: Student scores, shape (N, V).
        teacher_logits: Teacher scores, shape (N, V).
        temperature: Both are divided by it before the softmax.
    """
    log_student = F.log_softmax(wide(student_logits) / temperature, dim=-1)
    log_teacher = F.log_softmax(wide(teacher_logits) / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()


def cross_entropy(student_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the true next tokens, in nats, over those that are not `IGNORE_INDEX`.

    Args:
        student_logits: Student scores, shape (N, V).
        targets: Token ids, shape (N,).
    """
    total = F.cross_entropy(wide(student_logits), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least fp32."""
    return x if x.dtype == torch.float64 else x.float()
