"""LM head and losses in chunks of tokens, so that the full logits of student and teacher never exist in memory.

At 8,192 tokens and a vocabulary of 50k, one set of logits takes 1.6 GB in fp32, and a plain implementation stores
several. Here the logits of a chunk are computed, scored, overwritten by their gradient and freed before the next chunk.
Forward thus computes the gradients as well, and backward only returns them (like Liger's fused loss).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F

from litgpt_whittle.distillation.chunk_scores import Scores, dense_scores, is_dense
from litgpt_whittle.distillation.head_gradients import Gradients
from litgpt_whittle.distillation.objective import Objective, SparseTargets
from litgpt_whittle.distillation.vocabulary import SharedTargets, shared_targets
from litgpt_whittle.tensors import (
    IGNORE_INDEX,
    upcast,
)

if TYPE_CHECKING:
    from litgpt.model import GPT

    from litgpt_whittle.distillation.hidden import HiddenLoss

CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
"""Logits per chunk, by device type. On a CPU, malloc reuses buffers up to 32 MB; larger ones are mapped as fresh pages
each time. On a GPU, each chunk reads and writes the whole gradient of the head, so it needs about 1,000 tokens to be
bound by FLOPs."""

PART_ELEMENTS = {"cpu": 2**19}
"""Logits of a chunk that are scored at once, by device type; by default all. Repeated passes over 2 MB stay in a CPU's
cache."""

TILE = (512, 1024)
"""Size of a tile of logits, in tokens and vocabulary entries, when a CPU computes a cross-entropy without gradients."""


class HeadInput(NamedTuple):
    """Input and parameters of an LM head, captured in the forward pass, when sharded parameters are gathered."""

    hidden: torch.Tensor  # (B, T, n_embd)
    weight: torch.Tensor  # (V, n_embd)
    bias: torch.Tensor | None  # (V,)


class HeadTap(nn.Linear):
    """Replacement for an LM head that can capture the head's input; its parameters keep their names.

    While `tapping`, it stores its input and computes no logits.
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
    """Run a litgpt model up to its LM head, and return the head's input and parameters.

    Args:
        model: A litgpt `GPT`; its head is replaced by a `HeadTap` with the same parameters at the first call.
        input_ids: Token ids, shape (B, T).
    """
    tap = tap_head(getattr(model, "head_owner", model))
    tap.tapping = True
    model(input_ids)
    caught, tap.caught, tap.tapping = tap.caught, None, False
    assert caught is not None, "the model did not run its LM head"
    return caught


def tap_head(model: nn.Module) -> HeadTap:
    """Replace the model's LM head with a `HeadTap`, unless it is one already, and return it."""
    head: Any = model.lm_head
    if not isinstance(head, HeadTap):
        head = model.lm_head = HeadTap(head)
    return head


class SoftTargets(Protocol):
    """A teacher's targets for the tokens of one batch, flattened.

    The optional attribute `n_entries` is the size of the teacher's vocabulary; by default, it equals the student's.
    """

    def chunk(self, start: int, stop: int) -> torch.Tensor | SparseTargets:
        """Return the targets of tokens `start` to `stop`: sparse ones, or logits (stop - start, V), at least fp32.

        The caller may overwrite them.
        """
        ...


class TeacherLogits:
    """A teacher's logits for one batch, computed chunk by chunk.

    Not a tuple or dataclass, because Fabric would cast their tensors, including the head's weights, to the student's
    precision at every step.

    Args:
        head_input: The teacher's hidden states and head.
        softcap: litgpt's `final_logit_softcapping`.
        streams: The teacher's hidden states to match, by place (`litgpt_whittle.distillation.hidden`), each
            (B, T, n_embd).
    """

    def __init__(
        self, head_input: HeadInput, softcap: float | None = None, streams: Mapping[Any, torch.Tensor] | None = None
    ) -> None:
        self.streams = streams or {}
        self.hidden = head_input.hidden.reshape(-1, head_input.hidden.size(-1))
        self.weight, self.bias = head_input.weight, head_input.bias
        self.softcap, self.n_entries = softcap, head_input.weight.size(0)

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        """Return logits of tokens `start` to `stop`, (stop - start, V), at least fp32, which the caller may change."""
        return _logits(self.hidden[start:stop], self.weight, self.bias, self.softcap)


class HeadLosses(NamedTuple):
    """Scalar losses: `loss` to differentiate, and its parts, detached and without the factors alpha, beta and T²."""

    loss: torch.Tensor
    ce: torch.Tensor
    distill: torch.Tensor
    hidden: torch.Tensor | None = None
    """The hidden-state loss, weighted, if hidden states are matched"""


FusedLoss = Callable[[HeadInput, torch.Tensor, Objective, "SoftTargets | None"], HeadLosses]
"""(head's input, targets (B, T), objective, teacher's targets) -> losses, as `head_loss` computes them"""


class LossModel(nn.Module):
    """A litgpt model that returns its losses instead of logits: the root module that is compiled and sharded.

    The head runs inside its forward, because under FSDP2 a root's parameters are gathered only there.

    Args:
        model: The litgpt model; its head is replaced by a `HeadTap` with the same parameters.
        hidden: Loss between the two models' hidden states (`litgpt_whittle.distillation.hidden`).
    """

    objective = Objective()
    """The current objective. It is an attribute, not an argument of `forward`, because Fabric takes dataclass arguments
    apart. It is not part of the compiled graph."""

    compiles_scores = False
    """If true, use the compiled `dense_scores` for objectives that it computes (`is_dense`)"""

    fused_loss: FusedLoss | None = None
    """Replacement for `head_loss` in training, such as `litgpt_whittle.distillation.liger.liger_loss`; None for none"""

    device_type: str | None = None
    """Device type that determines chunk sizes and kernels; by default that of the tensors. A memory plan for a GPU that
    this machine lacks sets it"""

    model: GPT
    hidden: HiddenLoss | None

    def __init__(self, model: GPT, hidden: HiddenLoss | None = None) -> None:
        super().__init__()
        tap_head(model)
        self.model, self.hidden = model, hidden

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor, teacher: SoftTargets | None = None) -> HeadLosses:
        """Return the losses of one batch.

        Args:
            input_ids: Token ids, shape (B, T).
            targets: Next tokens, shape (B, T).
            teacher: The teacher's targets for `input_ids`; if None, the loss has no distillation term.
        """
        softcap = self.model.config.final_logit_softcapping
        matching = None if teacher is None else self.hidden
        if matching is not None:
            matching.watch.is_on = True
        head_input = hidden_states(self.model, input_ids)
        if self.fused_loss is not None and torch.is_grad_enabled():
            losses = self.fused_loss(head_input, targets, self.objective, teacher)
        else:
            losses = head_loss(
                head_input,
                targets,
                self.objective,
                teacher,
                softcap,
                compiles_scores=self.compiles_scores,
                device_type=self.device_type,
            )
        if matching is None:
            return losses
        matching.watch.is_on = False
        matched = matching(teacher.streams, targets != IGNORE_INDEX)  # type: ignore[union-attr]
        return losses._replace(loss=losses.loss + matched, hidden=matched.detach())


@torch.compiler.disable
def head_loss(
    head_input: HeadInput,
    targets: torch.Tensor | None,
    objective: Objective = Objective(),
    teacher: SoftTargets | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    compiles_scores: bool = False,
    device_type: str | None = None,
) -> HeadLosses:
    """Apply the LM head and return the losses, averaged over the tokens whose target is not `IGNORE_INDEX`.

    Under autocast the matmuls run in its dtype, as in litgpt's head; all else is fp32 (float64 if the hidden states
    are).

    Args:
        head_input: The student's hidden states (B, T, n_embd) and head.
        targets: Next tokens, shape (B, T); if None, all tokens count and the cross-entropy is 0.
        objective: The objective.
        teacher: The teacher's targets; if None, the loss has no distillation term.
        softcap: litgpt's `final_logit_softcapping`.
        chunk_size: Tokens per chunk; by default set by the vocabulary's size.
        compiles_scores: If true, use the compiled `dense_scores` for objectives that it computes (`is_dense`).
        device_type: Device type that determines chunk sizes and kernels; by default that of the tensors.
    """
    hidden, weight, bias = head_input
    hidden = hidden.reshape(-1, hidden.size(-1))
    targets = None if targets is None else targets.reshape(-1)
    kind = device_type or hidden.device.type
    chunk_size = chunk_size or max(32, CHUNK_ELEMENTS.get(kind, 2**24) // weight.size(0))
    teacher = shared_targets(teacher if objective.beta else None, weight.size(0))
    task = _Task(objective, teacher, softcap, chunk_size, compiles_scores, kind)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        return HeadLosses(*_HeadLoss.apply(hidden, weight, bias, targets, task))
    with torch.no_grad():
        return HeadLosses(*task.run(hidden, weight, bias, targets, (False, False, False))[0])


class _HeadLoss(torch.autograd.Function):
    """Autograd function that computes the gradients in forward, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, task: _Task):
        losses, ctx.grads = task.run(hidden, weight, bias, targets, ctx.needs_input_grad[:3])
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_):
        if ctx.grads is None:
            raise RuntimeError("the gradients of `head_loss` are freed after one backward pass; call `head_loss` again")
        # in place, because with a large vocabulary the head's gradient is as large as a chunk's logits
        grads = tuple(None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.grads)
        ctx.grads = None
        return *grads, None, None


@dataclass(frozen=True)
class _Task:
    """Arguments of `head_loss` that are not tensors to differentiate."""

    objective: Objective
    teacher: SoftTargets | None
    softcap: float | None
    chunk_size: int
    compiles_scores: bool
    kind: str
    """Device type that determines chunk sizes and kernels"""

    def run(self, hidden, weight, bias, targets, needs: tuple[bool, bool, bool]):
        """Return the three losses, and the needed gradients of the first for hidden, weight and bias."""
        kind, dtype = hidden.device.type, matmul_dtype(hidden)
        with torch.autocast(kind, enabled=False):
            h, w, b = (None if x is None else x.to(dtype) for x in (hidden, weight, bias))
            if kind == "cpu" and targets is not None and self.teacher is None and not any(needs):
                ce = _cross_entropy(h, w, b, targets, self.softcap)
                return (self.objective.alpha * ce, ce, torch.zeros_like(ce)), (None, None, None)
            losses, grads = self._run(h, w, b, targets, needs)
            return losses, grads.finish(hidden, weight, bias)

    def _run(self, h, w, b, targets, needs: tuple[bool, bool, bool]):
        """Return the three losses, and the gradients before the cast to their inputs' dtypes."""
        exact = torch.promote_types(h.dtype, torch.float32)
        grads = Gradients(h, w, b, needs, exact, self.kind)
        share = _shares(h, targets, exact)
        ce = distill = torch.zeros((), dtype=exact, device=h.device)
        n_rows = max(1, PART_ELEMENTS.get(self.kind, self.chunk_size * len(w)) // len(w))
        for start in range(0, len(h), self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            logits = _logits(h[rows], w, b, self.softcap)
            parts = logits.split(n_rows)
            taught: Sequence[torch.Tensor | SparseTargets | None] = [None] * len(parts)
            labels: Sequence[torch.Tensor | None] = [None] * len(parts)
            if self.teacher is not None:
                taught = self.teacher.chunk(start, start + len(logits)).split(n_rows)
            if targets is not None:
                labels = targets[rows].split(n_rows)
            for part in zip(parts, share[rows].split(n_rows), taught, labels):
                part_ce, part_distill = self._score(*part, any(needs))
                ce, distill = ce + part_ce, distill + part_distill
            if any(needs):
                grads.add(rows, logits)
        scale = self.objective.beta * self.objective.temperature**2
        total = self.objective.alpha * ce + scale * distill
        return (total, ce, distill), grads

    def _score(self, logits, share, taught, targets, with_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of some tokens, and overwrite their logits: with their gradients if `with_grad` is true."""
        targets = None if targets is None else targets.clamp(min=0)
        if self.compiles_scores and with_grad and targets is not None:
            if not isinstance(self.teacher, SharedTargets) and is_dense(self.objective, taught, logits.size(1)):
                return dense_scores(logits, taught, targets, share, self.objective, self.softcap)
        cap_slope = self._cap_slope(logits) if with_grad else None
        scores = Scores(logits, share.unsqueeze(1), with_grad)
        if taught is not None:
            # first, because cross-entropy overwrites the logits
            if isinstance(self.teacher, SharedTargets):
                scores.add_shared_distill(self.objective, taught, self.teacher.n)
            else:
                scores.add_distill(self.objective, taught)
        if targets is not None:
            scores.add_cross_entropy(targets, self.objective.alpha)
        if with_grad:
            assert scores.grad is not None, "no loss has a weight"
            logits.copy_(scores.grad if cap_slope is None else scores.grad.mul_(cap_slope))
        return scores.ce, scores.distill

    def _cap_slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Return d softcap(x) / dx = 1 - tanh², or None without a softcap."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square_()


def matmul_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype in which the head multiplies hidden states: autocast's, if it is enabled."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _shares(hidden, targets, dtype: torch.dtype) -> torch.Tensor:
    """Return each token's weight in the mean, (N,)."""
    valid = hidden.new_ones(len(hidden), dtype=torch.bool) if targets is None else targets != IGNORE_INDEX
    return valid.to(dtype) / valid.sum().clamp(min=1)


def _cross_entropy(hidden, weight, bias, targets, softcap: float | None) -> torch.Tensor:
    """Return the mean cross-entropy without gradients, computed in tiles of tokens and of the vocabulary.

    A token's loss is the log-sum-exp of its logits, which accumulates over the tiles, minus its target's logit.
    """
    n_rows, n_entries = TILE
    shares = _shares(hidden, targets, torch.promote_types(hidden.dtype, torch.float32))
    ce = shares.new_zeros(())
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
    """Return the logits of litgpt's head, shape (n, V), at least fp32, for hidden states of shape (n, n_embd)."""
    logits = upcast(F.linear(hidden, weight, bias))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
