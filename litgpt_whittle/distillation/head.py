"""LM head and losses in chunks of tokens, so that nobody's logits ever exist whole.

At 8,192 tokens and a vocabulary of 50k one set of logits takes 1.6 GB in fp32, and the plain formula keeps several,
the teacher's among them. Here a chunk's logits are made, scored, turned into their gradient and thrown away before
the next chunk's: forward computes the gradients too, and backward only hands them out (as Liger's fused loss does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from litgpt_whittle.distillation.losses import IGNORE_INDEX, forward_kl, wide
from litgpt_whittle.distillation.objective import Objective, SparseTargets, Term, log_probabilities
from litgpt_whittle.distillation.vocabulary import SharedTargets, shared_targets, with_empty_entry

CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
"""Logits per chunk. On a CPU, buffers up to 32 MB are reused by malloc, larger ones come as fresh pages each time."""

PART_ELEMENTS = {"cpu": 2**19}
"""Logits of a chunk that are scored at once, all where nothing is said: many passes over 2 MB stay in a CPU's cache."""
TILE = (512, 1024)
"""Tokens and vocabulary entries whose logits a CPU makes and scores at once where only a cross-entropy is asked for."""


class HeadInput(NamedTuple):
    """What an LM head is called with, and its parameters at that moment: whole even where they are sharded."""

    hidden: torch.Tensor  # (B, T, n_embd)
    weight: torch.Tensor  # (V, n_embd)
    bias: torch.Tensor | None  # (V,)


class HeadTap(nn.Linear):
    """Takes an LM head's place, and its parameters under their names, to catch what it is called with.

    While `tapping`, it keeps its input and returns nothing, so litgpt's own forward ends at the hidden states.
    """

    def __init__(self, head: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias
        self.tapping = False
        self.caught: HeadInput | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.tapping:
            return super().forward(x)
        self.caught = HeadInput(x, self.weight, self.bias)
        return x[..., :0]


def hidden_states(model: nn.Module, input_ids: torch.Tensor) -> HeadInput:
    """Runs a litgpt model up to its LM head.

    Args:
        model: A litgpt `GPT`; its head is replaced by a `HeadTap` with the same parameters at the first call.
        input_ids: Token ids, shape (B, T).
    """
    tap = tap_head(getattr(model, "head_owner", model))
    tap.tapping = True
    model(input_ids)
    caught, tap.caught, tap.tapping = tap.caught, None, False
    return caught


def tap_head(model: nn.Module) -> HeadTap:
    """Puts a `HeadTap` in the place of the model's LM head, once."""
    if not isinstance(model.lm_head, HeadTap):
        model.lm_head = HeadTap(model.lm_head)
    return model.lm_head


class SoftTargets(Protocol):
    """What a teacher says about one batch's tokens, in the order of the flattened batch.

    Where the student's vocabulary may have another size, `n_entries` is the teacher's.
    """

    def chunk(self, start: int, stop: int) -> torch.Tensor | SparseTargets:
        """About tokens `start` to `stop`: logits, (stop - start, V), at least fp32, for the caller to overwrite."""
        ...


class TeacherLogits:
    """A teacher's logits for one batch, made chunk by chunk.

    Deliberately opaque: as a tuple or dataclass Fabric would cast its tensors to the student's precision, head
    weights included, at every step.

    Args:
        head_input: The teacher's hidden states and head.
        softcap: litgpt's `final_logit_softcapping`.
        streams: What its stream was at the places that are matched, each (B, T, n_embd).
    """

    def __init__(
        self, head_input: HeadInput, softcap: float | None = None, streams: Mapping[Any, torch.Tensor] | None = None
    ) -> None:
        self.streams = streams or {}
        self.hidden = head_input.hidden.reshape(-1, head_input.hidden.size(-1))
        self.weight, self.bias = head_input.weight, head_input.bias
        self.softcap, self.n_entries = softcap, head_input.weight.size(0)

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        """Logits of tokens `start` to `stop`, shape (stop - start, V), at least fp32, for the caller to overwrite."""
        return _logits(self.hidden[start:stop], self.weight, self.bias, self.softcap)


class HeadLosses(NamedTuple):
    """Scalars: what to differentiate, and its parts, without gradients and weights."""

    loss: torch.Tensor
    ce: torch.Tensor
    distill: torch.Tensor
    hidden: torch.Tensor | None = None
    """Where the stream is matched too: that part, with its weight"""


class LossModel(nn.Module):
    """A litgpt model that gives its losses instead of its logits: the root module that is compiled and sharded.

    The head belongs inside its forward, because under FSDP2 a root's parameters are whole only there.

    Args:
        model: The litgpt model; its head is replaced by a `HeadTap` with the same parameters.
        hidden: Adds a distance between the two models' streams (`litgpt_whittle.distillation.hidden`).
    """

    objective = Objective()
    """What `loss` is. No argument, because Fabric's wrapper would take it apart, nor a part of the compiled graph."""

    def __init__(self, model: nn.Module, hidden: nn.Module | None = None) -> None:
        super().__init__()
        tap_head(model)
        self.model, self.hidden = model, hidden

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor, teacher: SoftTargets | None = None) -> HeadLosses:
        """Losses of one batch.

        Args:
            input_ids: Token ids, shape (B, T).
            targets: Next tokens, shape (B, T).
            teacher: What the teacher says about `input_ids`; without, the loss has no part for it.
        """
        softcap = self.model.config.final_logit_softcapping
        is_matched = self.hidden is not None and teacher is not None
        if is_matched:
            self.hidden.watch.is_on = True
        losses = head_loss(hidden_states(self.model, input_ids), targets, self.objective, teacher, softcap)
        if not is_matched:
            return losses
        self.hidden.watch.is_on = False
        matched = self.hidden(teacher.streams, targets != IGNORE_INDEX)
        return losses._replace(loss=losses.loss + matched, hidden=matched.detach())


@torch.compiler.disable
def head_loss(
    head_input: HeadInput,
    targets: torch.Tensor | None,
    objective: Objective = Objective(),
    teacher: SoftTargets | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> HeadLosses:
    """LM head and losses, means over the tokens that are not `IGNORE_INDEX`.

    The matmuls run in the autocast dtype where autocast is on, as litgpt's head does; all else in fp32 (float64
    if the hidden states are).

    Args:
        head_input: The student's hidden states (B, T, n_embd) and head.
        targets: Next tokens, shape (B, T); without, all tokens count and there is no cross-entropy.
        objective: The loss.
        teacher: What the teacher says; without, the loss has no part for it.
        softcap: litgpt's `final_logit_softcapping`.
        chunk_size: Tokens per chunk; chosen by the vocabulary's size by default.
    """
    hidden, weight, bias = head_input
    hidden = hidden.reshape(-1, hidden.size(-1))
    targets = None if targets is None else targets.reshape(-1)
    chunk_size = chunk_size or max(32, CHUNK_ELEMENTS.get(hidden.device.type, 2**24) // weight.size(0))
    teacher = shared_targets(teacher if objective.beta else None, weight.size(0))
    task = _Task(objective, teacher, softcap, chunk_size)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        return HeadLosses(*_HeadLoss.apply(hidden, weight, bias, targets, task))
    with torch.no_grad():
        return HeadLosses(*task.run(hidden, weight, bias, targets, (False, False, False))[0])


class _HeadLoss(torch.autograd.Function):
    """Gradients are computed forward, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, task: _Task):
        losses, ctx.grads = task.run(hidden, weight, bias, targets, ctx.needs_input_grad[:3])
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_):
        if ctx.grads is None:
            raise RuntimeError("the chunked head's gradients were already handed out; call it again")
        # in place: at a large vocabulary the head's gradient is as large as a chunk's logits
        grads = tuple(None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.grads)
        ctx.grads = None
        return *grads, None, None


@dataclass(frozen=True)
class _Task:
    objective: Objective
    teacher: SoftTargets | None
    softcap: float | None
    chunk_size: int

    def run(self, hidden, weight, bias, targets, needs: tuple[bool, bool, bool]):
        """The three losses and the gradients of the first that are needed, for hidden, weight and bias."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        with torch.autocast(kind, enabled=False):
            h, w, b = (None if x is None else x.to(dtype) for x in (hidden, weight, bias))
            if kind == "cpu" and targets is not None and self.teacher is None and not any(needs):
                ce = _cross_entropy(h, w, b, targets, self.softcap)
                return (self.objective.alpha * ce, ce, torch.zeros_like(ce)), (None, None, None)
            losses, grads = self._run(h, w, b, targets, needs)
            return losses, grads.finish(hidden, weight, bias)

    def _run(self, h, w, b, targets, needs: tuple[bool, bool, bool]):
        """The three losses, and the gradients before they have their inputs' precision again."""
        exact = torch.promote_types(h.dtype, torch.float32)
        grads = _Gradients(h, w, b, needs, exact)
        share = _shares(h, targets, exact)
        ce = distill = torch.zeros((), dtype=exact, device=h.device)
        n_rows = max(1, PART_ELEMENTS.get(h.device.type, self.chunk_size * len(w)) // len(w))
        for start in range(0, len(h), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            logits = _logits(h[rows], w, b, self.softcap)
            parts = logits.split(n_rows)
            taught = labels = [None] * len(parts)
            if self.teacher is not None:
                taught = self.teacher.chunk(start, start + len(logits)).split(n_rows)
            if targets is not None:
                labels = targets[rows].split(n_rows)
            for part in zip(parts, share[rows].split(n_rows), taught, labels):
                scores = self._score(*part, any(needs))
                ce, distill = ce + scores.ce, distill + scores.distill
            if any(needs):
                grads.add(rows, logits)
        scale = self.objective.beta * self.objective.temperature**2
        total = self.objective.alpha * ce + scale * distill
        return (total, ce, distill), grads

    def _score(self, logits, share, taught, targets, with_grad: bool) -> _Scores:
        """The losses of some tokens, whose logits are overwritten: by their gradients where there are any."""
        cap_slope = self._cap_slope(logits) if with_grad else None
        scores = _Scores(logits, share.unsqueeze(1), with_grad)
        if taught is not None:
            # first, because cross-entropy overwrites the logits
            if isinstance(self.teacher, SharedTargets):
                scores.add_shared_distill(self.objective, taught, self.teacher.n)
            else:
                scores.add_distill(self.objective, taught)
        if targets is not None:
            scores.add_cross_entropy(targets.clamp(min=0), self.objective.alpha)
        if with_grad:
            logits.copy_(scores.grad if cap_slope is None else scores.grad.mul_(cap_slope))
        return scores

    def _cap_slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """d softcap(x) / dx = 1 - tanh²."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square_()


class _Gradients:
    """Sums what the chunks' logit gradients give for the head and its input."""

    def __init__(self, h, w, b, needs: tuple[bool, bool, bool], exact: torch.dtype) -> None:
        self.h, self.w = h, w
        self.hidden = torch.empty_like(h) if needs[0] else None
        self.weight = torch.zeros_like(w, dtype=exact) if needs[1] else None
        self.bias = torch.zeros_like(b, dtype=exact) if b is not None and needs[2] else None

    def add(self, rows: slice, grad: torch.Tensor) -> None:
        narrow = grad.to(self.h.dtype)
        if self.hidden is not None:
            torch.mm(narrow, self.w, out=self.hidden[rows])
        if self.weight is not None and self.weight.dtype == narrow.dtype:
            self.weight.addmm_(narrow.t(), self.h[rows])
        elif self.weight is not None:
            self.weight += narrow.t() @ self.h[rows]
        if self.bias is not None:
            self.bias += grad.sum(0)

    def finish(self, *inputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grads = (self.hidden, self.weight, self.bias)
        return tuple(None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs))


class _Scores:
    """One chunk's losses, and their gradient with respect to its logits.

    Args:
        logits: (n, V), overwritten.
        share: Each token's part of the mean, 0 where it does not count, (n, 1).
        with_grad: Whether to compute `grad`, (n, V).
    """

    def __init__(self, logits, share, with_grad: bool) -> None:
        self.logits, self.share, self.with_grad = logits, share, with_grad
        self.grad: torch.Tensor | None = None
        self.ce = self.distill = logits.new_zeros(())

    def add_cross_entropy(self, targets: torch.Tensor, alpha: float) -> None:
        """Targets are (n,), valid token ids also where a token does not count."""
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
        """Add the distance over the first n entries, which the teacher has too; the others get no gradient from it."""
        logits = self.logits[:, :n]
        if n == self.logits.size(1) and isinstance(teacher, SparseTargets) and teacher.log_tail is not None:
            logits = with_empty_entry(logits, objective.temperature)
        part = _Scores(logits, self.share, self.with_grad)
        part.add_distill(objective, teacher)
        self.distill = part.distill
        if part.grad is not None:
            self._add_grad(F.pad(part.grad[:, :n], (0, self.logits.size(1) - n)))

    def add_distill(self, objective: Objective, teacher: torch.Tensor | SparseTargets) -> None:
        if isinstance(teacher, SparseTargets):
            teacher = teacher.to(self.logits.dtype)
        by_autograd = [term for term in objective.terms if term.loss is not forward_kl]
        if by_autograd:
            self._add_by_autograd(objective, by_autograd, teacher)
        for term in objective.terms:
            # last, because a closed form overwrites the teacher's logits
            if term.loss is forward_kl:
                add = self._add_forward_kl if isinstance(teacher, torch.Tensor) else self._add_sparse_forward_kl
                add(teacher, objective.temperature, term.weight, objective.beta * objective.temperature * term.weight)

    def _add_forward_kl(self, teacher: torch.Tensor, t: float, weight: float, slope: float) -> None:
        log_t = F.log_softmax(teacher.div_(t), dim=-1)
        log_s = F.log_softmax(self.logits / t, dim=-1)
        p_t = torch.exp(log_t, out=teacher)
        # logits that are not a number make all of a row so, and stay to be seen
        broken = 0 * (log_s.amax(-1, keepdim=True) + p_t.amax(-1, keepdim=True))
        # 0 · inf of tokens without probability counts as 0; in place, since a mask would take memory of its own
        kl = log_t.sub_(log_s).mul_(p_t).nan_to_num_(0.0, torch.inf, -torch.inf).sum(-1, keepdim=True) + broken
        self.distill = self.distill + weight * self._mean(kl)
        if self.with_grad:
            # softmax - softmax, divided by T, times T²
            self._add_grad(log_s.exp_().sub_(p_t).mul_(slope * self.share))

    def _add_sparse_forward_kl(self, teacher: SparseTargets, t: float, weight: float, slope: float) -> None:
        """The tail counts as one event, whose probability is the sum of its tokens'."""
        log_s = F.log_softmax(self.logits / t, dim=-1)
        known, p = log_s.gather(1, teacher.ids), teacher.log_p.exp()
        kl = torch.where(p > 0, p * (teacher.log_p - known), 0.0).sum(-1, keepdim=True)
        q, scale = log_s.exp_(), slope * self.share
        if teacher.log_tail is not None and teacher.ids.size(1) < q.size(1):
            # the known tokens' places in q are not needed again: without them it adds up to the tail
            tail = q.scatter_(1, teacher.ids, 0.0).sum(-1, keepdim=True)
            behind = teacher.log_tail - tail.clamp(min=torch.finfo(tail.dtype).tiny).log()
            kl += torch.where(teacher.log_tail > -torch.inf, teacher.log_tail.exp() * behind, 0.0)
            if self.with_grad:
                # a tail token's part of q_tail is scaled to the teacher's tail; where that underflows its tokens do too
                q.mul_((1 - behind.clamp(max=80.0).exp()) * scale).scatter_(1, teacher.ids, (known.exp() - p) * scale)
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
                    values = values + term.weight * term.loss(student / t, wide(teacher) / t)
                else:
                    logs = log_probabilities(student, teacher, t) if logs is None else logs
                    values = values + term.weight * term.loss(*logs)
            value = self._mean(values.unsqueeze(1))
        self.distill = self.distill + value.detach()
        if self.with_grad:
            grad = torch.autograd.grad(value, student)[0].masked_fill_(self.share == 0, 0.0)
            self._add_grad(grad.mul_(objective.beta * t**2))

    def _mean(self, losses: torch.Tensor) -> torch.Tensor:
        """Return this chunk's part of the mean of losses, (n, 1); one that does not count may be infinite."""
        return (losses.masked_fill(self.share == 0, 0.0) * self.share).sum()

    def _add_grad(self, grad: torch.Tensor) -> None:
        # into the newer one: the cross-entropy's are the logits' memory, where all are wanted in the end
        self.grad = grad if self.grad is None else grad.add_(self.grad)


def _shares(hidden, targets, dtype: torch.dtype) -> torch.Tensor:
    """Each token's part of the mean, (N,)."""
    valid = hidden.new_ones(len(hidden), dtype=torch.bool) if targets is None else targets != IGNORE_INDEX
    return valid.to(dtype) / valid.sum().clamp(min=1)


def _cross_entropy(hidden, weight, bias, targets, softcap: float | None) -> torch.Tensor:
    """The mean cross-entropy without gradients, in tiles of tokens and of the vocabulary.

    No logits are needed but the target's and the logarithm of the sum of all, which adds up over the tiles.
    """
    n_rows, n_entries = TILE
    ce = 0.0
    shares = _shares(hidden, targets, torch.promote_types(hidden.dtype, torch.float32))
    for h, target, share in zip(hidden.split(n_rows), targets.split(n_rows), shares.split(n_rows)):
        total = known = share.new_full((len(h),), -torch.inf)
        for start in range(0, len(weight), n_entries):
            entries = slice(start, start + n_entries)
            logits = _logits(h, weight[entries], None if bias is None else bias[entries], softcap)
            place = (target - start).unsqueeze(1)
            is_here = (place >= 0) & (place < logits.size(1))
            found = logits.gather(1, place.clamp(0, logits.size(1) - 1))
            known = torch.where(is_here, found, known.unsqueeze(1)).squeeze(1)
            top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)  # all may be -inf
            total = total.logaddexp(logits.sub_(top).exp_().sum(-1).log_().add_(top.squeeze(1)))
        ce = ce + ((total - known).masked_fill(share == 0, 0.0) * share).sum()
    return ce


def _logits(hidden, weight, bias, softcap: float | None) -> torch.Tensor:
    """litgpt's head on (n, n_embd): (n, V), at least fp32."""
    logits = wide(F.linear(hidden, weight, bias))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
