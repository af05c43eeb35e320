"""Losses of one chunk of logits, and their gradient with respect to these logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from litgpt_whittle.distillation.losses import forward_kl
from litgpt_whittle.distillation.objective import Objective, SparseTargets, Term, check_losses, log_probabilities
from litgpt_whittle.distillation.vocabulary import with_empty_entry
from litgpt_whittle.tensors import upcast


class Scores:
    """One chunk's losses, and their gradient with respect to its logits.

    Args:
        logits: The student's logits, shape (n, V); overwritten.
        share: Weight of each token in the mean, shape (n, 1); 0 for tokens that do not count.
        with_grad: If true, compute `grad`, shape (n, V).
    """

    def __init__(self, logits: torch.Tensor, share: torch.Tensor, with_grad: bool) -> None:
        self.logits, self.share, self.with_grad = logits, share, with_grad
        self.grad: torch.Tensor | None = None
        self.ce = self.distill = logits.new_zeros(())

    def add_cross_entropy(self, targets: torch.Tensor, alpha: float) -> None:
        """Add the cross-entropy.

        Args:
            targets: Next tokens, shape (n,); valid ids even where a token does not count.
            alpha: Weight of the cross-entropy in the gradient.
        """
        targets = targets.unsqueeze(1)
        log_p = F.log_softmax(self.logits, dim=-1)
        self.ce = self._mean(-log_p.gather(1, targets))
        if not self.with_grad or not alpha:
            return
        weight = alpha * self.share
        grad = torch.exp(log_p, out=self.logits).mul_(weight)  # softmax - one-hot
        grad.scatter_add_(1, targets, -weight)
        self._add_grad(grad)

    def add_shared_distill(self, objective: Objective, teacher: torch.Tensor | SparseTargets, n: int) -> None:
        """Add the distance over the first n vocabulary entries, which teacher and student share.

        The distance has no gradient for the other entries.
        """
        logits = self.logits[:, :n]
        if n == self.logits.size(1) and isinstance(teacher, SparseTargets) and teacher.log_tail is not None:
            logits = with_empty_entry(logits, objective.temperature)
        part = Scores(logits, self.share, self.with_grad)
        part.add_distill(objective, teacher)
        self.distill = part.distill
        if part.grad is not None:
            self._add_grad(F.pad(part.grad[:, :n], (0, self.logits.size(1) - n)))

    def add_distill(self, objective: Objective, teacher: torch.Tensor | SparseTargets) -> None:
        """Add the distance to the teacher.

        Raises:
            UserError: If the targets are sparse and a loss needs all logits.
        """
        if isinstance(teacher, SparseTargets):
            check_losses(objective.terms, "distributions", "teacher's sparse targets")
            teacher = teacher.to(self.logits.dtype)
        by_autograd = [term for term in objective.terms if term.loss is not forward_kl]
        if by_autograd:
            self._add_by_autograd(objective, by_autograd, teacher)
        for term in objective.terms:
            # last, because a closed form overwrites the teacher's logits
            if term.loss is forward_kl:
                slope = objective.beta * objective.temperature * term.weight
                if isinstance(teacher, torch.Tensor):
                    self._add_forward_kl(teacher, objective.temperature, term.weight, slope)
                else:
                    self._add_sparse_forward_kl(teacher, objective.temperature, term.weight, slope)

    def _add_forward_kl(self, teacher: torch.Tensor, t: float, weight: float, slope: float) -> None:
        log_t = F.log_softmax(teacher.div_(t), dim=-1)
        log_s = F.log_softmax(self.logits / t, dim=-1)
        p_t = torch.exp(log_t, out=teacher)
        # 0, or NaN for a row with NaN logits, which nan_to_num would hide
        broken = 0 * (log_s.amax(-1, keepdim=True) + p_t.amax(-1, keepdim=True))
        # 0 · inf of tokens with probability 0 counts as 0; in place, because a mask would need extra memory
        kl = log_t.sub_(log_s).mul_(p_t).nan_to_num_(0.0, torch.inf, -torch.inf).sum(-1, keepdim=True) + broken
        self.distill = self.distill + weight * self._mean(kl)
        if self.with_grad:
            # softmax - softmax, divided by T, times T²
            self._add_grad(log_s.exp_().sub_(p_t).mul_(slope * self.share))

    def _add_sparse_forward_kl(self, teacher: SparseTargets, t: float, weight: float, slope: float) -> None:
        """Add the forward KL to sparse targets; the tail is one event with the summed probability of its tokens."""
        log_s = F.log_softmax(self.logits / t, dim=-1)
        known, p = log_s.gather(1, teacher.ids), teacher.log_p.exp()
        kl = torch.where(p > 0, p * (teacher.log_p - known), 0.0).sum(-1, keepdim=True)
        q, scale = log_s.exp_(), slope * self.share
        if teacher.log_tail is not None and teacher.ids.size(1) < q.size(1):
            # the known tokens' entries of q are no longer needed; with them zeroed, q sums to the tail
            tail = q.scatter_(1, teacher.ids, 0.0).sum(-1, keepdim=True)
            gap = teacher.log_tail - tail.clamp(min=torch.finfo(tail.dtype).tiny).log()
            kl += torch.where(teacher.log_tail > -torch.inf, teacher.log_tail.exp() * gap, 0.0)
            if self.with_grad:
                # tail tokens' probabilities are rescaled to the teacher's tail; if q_tail underflows, so do its tokens'
                q.mul_((1 - gap.clamp(max=80.0).exp()) * scale).scatter_(1, teacher.ids, (known.exp() - p) * scale)
        elif self.with_grad:
            q.mul_(p.sum(-1, keepdim=True) * scale).scatter_add_(1, teacher.ids, -p * scale)
        self.distill = self.distill + weight * self._mean(kl)
        if self.with_grad:
            self._add_grad(q)

    def _add_by_autograd(self, objective: Objective, terms: list[Term], teacher: torch.Tensor | SparseTargets) -> None:
        t = objective.temperature
        with torch.enable_grad():
            student = self.logits.detach().requires_grad_(self.with_grad)
            values = student.new_zeros(len(student))
            logs = None
            for term in terms:
                if getattr(term.loss, "on_logits", False):
                    values = values + term.weight * term.loss(student / t, upcast(cast(torch.Tensor, teacher)) / t)
                else:
                    logs = log_probabilities(student, teacher, t) if logs is None else logs
                    values = values + term.weight * term.loss(*logs)
            value = self._mean(values.unsqueeze(1))
        self.distill = self.distill + value.detach()
        if self.with_grad:
            grad = torch.autograd.grad(value, student)[0].masked_fill_(self.share == 0, 0.0)
            self._add_grad(grad.mul_(objective.beta * t**2))

    def _mean(self, losses: torch.Tensor) -> torch.Tensor:
        """Return this chunk's part of the mean of losses (n, 1); losses of tokens that do not count may be infinite."""
        return (losses.masked_fill(self.share == 0, 0.0) * self.share).sum()

    def _add_grad(self, grad: torch.Tensor) -> None:
        # into the newer tensor: the last one, the cross-entropy's, is in the logits' memory, where the sum must end up
        self.grad = grad if self.grad is None else grad.add_(self.grad)


N_COMPILED = 2
"""Tensors of the logits' size that the compiled `dense_scores` allocates on a CPU; a GPU's kernels may need fewer"""


def is_dense(objective: Objective, teacher: torch.Tensor | SparseTargets | None, n_entries: int) -> bool:
    """Return whether `dense_scores` computes the objective: the forward KL divergence to the logits of all tokens."""
    losses = [term.loss for term in objective.terms]
    return losses == [forward_kl] and isinstance(teacher, torch.Tensor) and teacher.size(-1) == n_entries


def dense_scores(
    logits: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    share: torch.Tensor,
    objective: Objective,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cross-entropy and forward KL divergence of a chunk, and overwrite its logits by their gradient.

    The results equal those of `Scores`. A single compiled function reads and writes the logits a few times, instead of
    about forty times.

    Args:
        logits: The student's logits (n, V), after the softcap.
        teacher: The teacher's logits (n, V).
        targets: Next tokens (n,); valid ids even where a token does not count.
        share: Weight of each token in the mean, shape (n,); 0 for tokens that do not count.
        objective: An objective for which `is_dense` is true.
        softcap: litgpt's `final_logit_softcapping`.
    """
    if isinstance(logits, FakeTensor):  # a memory plan compiles nothing
        _ = [torch.empty_like(logits) for _ in range(N_COMPILED)]
        return share.sum(), share.sum()
    (term,) = objective.terms
    slope = objective.beta * objective.temperature * term.weight
    # as tensors, because a number would be compiled again for each value of a schedule
    numbers = [logits.new_full((), value) for value in (objective.temperature, objective.alpha, slope)]
    torch._dynamo.maybe_mark_dynamic(logits, 0)  # the last chunk is shorter
    ce, kl = _compiled()(logits, teacher, targets, share.unsqueeze(1), *numbers, softcap)
    return ce, term.weight * kl


@cache
def _compiled() -> Callable:
    return torch.compile(_dense_scores)


def _dense_scores(logits, teacher, targets, share, t, alpha, slope, softcap: float | None):
    cap_slope = 1.0 if softcap is None else 1 - (logits / softcap).square()
    log_t, log_s, log_p = (F.log_softmax(x, dim=-1) for x in (teacher / t, logits / t, logits))
    p_t = log_t.exp()
    # 0, or NaN for a row with NaN logits, which the condition would hide
    broken = 0 * (log_s.amax(-1, keepdim=True) + p_t.amax(-1, keepdim=True))
    kl = torch.where(p_t > 0, p_t * (log_t - log_s), 0.0).sum(-1, keepdim=True) + broken
    is_target = torch.arange(logits.size(1), device=logits.device) == targets.unsqueeze(1)
    ce = -torch.where(is_target, log_p, 0.0).sum(-1, keepdim=True)
    grad = slope * share * (log_s.exp() - p_t) + alpha * share * (log_p.exp() - is_target.to(log_p.dtype))
    logits.copy_(cap_slope * grad)
    return tuple((loss.masked_fill(share == 0, 0.0) * share).sum() for loss in (ce, kl))
