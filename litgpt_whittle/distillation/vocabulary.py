"""Distil between padded vocabularies of different sizes, on the entries that teacher and student share.

Embeddings are padded to more rows than the tokenizer has tokens, and not always to the same number (Qwen 2.5: 151,936
and 152,064). Token i has row i in both models, so the first min(V_teacher, V_student) rows are shared. Both
distributions are renormalised over the shared rows before they are compared; logits are compared row by row. The
cross-entropy uses the student's whole vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from litgpt_whittle.distillation.objective import SparseTargets
from litgpt_whittle.errors import UserError

if TYPE_CHECKING:
    from litgpt_whittle.distillation.head import SoftTargets

NOTHING = -80.0
"""Log-probability of an impossible event: negligible in any loss, yet finite, so that gradients are finite"""


class SharedTargets:
    """A teacher's soft targets for the first entries of its vocabulary.

    Args:
        targets: The teacher's targets for its whole vocabulary.
        n: Number of entries that the student shares.
    """

    def __init__(self, targets: SoftTargets, n: int) -> None:
        self.targets, self.n = targets, n

    def chunk(self, start: int, stop: int) -> torch.Tensor | SparseTargets:
        """Return the targets of tokens `start` to `stop`: logits (stop - start, n), or sparse targets on n entries."""
        taught = self.targets.chunk(start, stop)
        return taught[:, : self.n] if isinstance(taught, torch.Tensor) else restrict(taught, self.n)


def shared_targets(targets: SoftTargets | None, n_student: int) -> SoftTargets | None:
    """Return the targets of the entries that both vocabularies share: all targets if the sizes are equal."""
    if targets is None:
        return None
    n_teacher = getattr(targets, "n_entries", n_student)
    return targets if n_teacher == n_student else SharedTargets(targets, min(n_teacher, n_student))


def restrict(taught: SparseTargets, n: int) -> SparseTargets:
    """Renormalise a teacher's sparse targets over the first n vocabulary entries.

    All of the tail (tokens that are not stored) counts as shared, because padding has almost no probability. If there
    is a tail, stored tokens beyond the first n get the id n and a negligible probability (see `with_empty_entry`).

    Raises:
        UserError: If there is a tail, and each distribution stores n tokens or more.
    """
    is_lacking = taught.ids >= n
    log_p = taught.log_p.masked_fill(is_lacking, -torch.inf)
    total = log_p.logsumexp(-1, keepdim=True)
    if taught.log_tail is None:
        total = total.masked_fill(total == -torch.inf, 0.0)  # no sample is shared: the token has no loss
        return SparseTargets(taught.ids.masked_fill(is_lacking, 0), log_p - total, None)
    if taught.ids.size(1) >= n:
        raise UserError(
            f"the teacher's cache must store fewer tokens per distribution than the student's {n} vocabulary entries, "
            f"got {taught.ids.size(1)}; cache the teacher with a smaller k"
        )
    total = torch.logaddexp(total, taught.log_tail)
    log_p = (log_p - total).masked_fill(is_lacking, NOTHING)
    return SparseTargets(taught.ids.masked_fill(is_lacking, n), log_p, taught.log_tail - total)


def with_empty_entry(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Append an entry of negligible probability to logits (n, V), for tokens that the student's vocabulary lacks."""
    low = logits.amax(-1, keepdim=True).add_(NOTHING * temperature)
    return torch.cat((logits, low), 1)
