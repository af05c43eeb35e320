"""Distil between padded vocabularies of different sizes: on the entries that teacher and student both have rows for.

Tokenizers are padded to more rows than they have tokens, and not always to the same number (Qwen 2.5: 151,936 and
152,064). Token i is row i of both, so that the first min(V_teacher, V_student) rows are shared. Distances compare the
two distributions over these, each renormalised; logits are compared row by row. The cross-entropy is that of the
student's own, whole vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from litgpt_whittle.distillation.objective import SparseTargets
from litgpt_whittle.errors import UserError

if TYPE_CHECKING:
    from litgpt_whittle.distillation.head import SoftTargets

NOTHING = -80.0
"""Log-probability of an event that stands for no token: without weight in any loss, yet finite, as its gradients are"""


class SharedTargets:
    """A teacher's soft targets for the first entries of its vocabulary.

    Args:
        targets: The teacher's, for all of its vocabulary.
        n: How many entries the student has, too.
    """

    def __init__(self, targets: SoftTargets, n: int) -> None:
        self.targets, self.n = targets, n

    def chunk(self, start: int, stop: int) -> torch.Tensor | SparseTargets:
        """About tokens `start` to `stop`: logits (stop - start, n), or what is known of the n entries."""
        taught = self.targets.chunk(start, stop)
        return taught[:, : self.n] if isinstance(taught, torch.Tensor) else restrict(taught, self.n)


def shared_targets(targets: SoftTargets | None, n_student: int) -> SoftTargets | None:
    """Return the targets as they are where both vocabularies have one size, else those of the shared entries."""
    n_teacher = n_student if targets is None else getattr(targets, "n_entries", n_student)
    return targets if n_teacher == n_student else SharedTargets(targets, min(n_teacher, n_student))


def restrict(taught: SparseTargets, n: int) -> SparseTargets:
    """Renormalise a teacher's known probabilities over the first n entries.

    Of the tail it is not known which entries it is made of: all of it counts as shared, because padding has next to no
    probability. Where there is a tail, known tokens beyond n get the id n and no weight (`with_empty_entry`).

    Raises:
        UserError: If as many tokens are known of each distribution as the student has entries.
    """
    is_lacking = taught.ids >= n
    log_p = taught.log_p.masked_fill(is_lacking, -torch.inf)
    total = log_p.logsumexp(-1, keepdim=True)
    if taught.log_tail is None:
        total = total.masked_fill(total == -torch.inf, 0.0)  # no sample is shared: nothing is learned
        return SparseTargets(taught.ids.masked_fill(is_lacking, 0), log_p - total, None)
    if taught.ids.size(1) >= n:
        raise UserError(
            f"the teacher's cache must know fewer tokens of each distribution than the student's {n} entries, it knows "
            f"{taught.ids.size(1)}; cache the teacher with a smaller k"
        )
    total = torch.logaddexp(total, taught.log_tail)
    log_p = (log_p - total).masked_fill(is_lacking, NOTHING)
    return SparseTargets(taught.ids.masked_fill(is_lacking, n), log_p, taught.log_tail - total)


def with_empty_entry(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Append an entry without weight to logits (n, V), which stands for tokens that a student has no row for."""
    low = logits.amax(-1, keepdim=True).add_(NOTHING * temperature)
    return torch.cat((logits, low), 1)
