"""Fit input projections: one regression per norm fits all projections after it.

The targets are the outputs of the teacher's projections, linear functions of the teacher's normalised stream. So that
stream is regressed once on the student's, and the weights of every projection are the teacher's times the solution.
This includes the LM head, without computing any logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from litgpt.model import Block
from torch import nn

from litgpt_whittle.index_plan import Plan
from litgpt_whittle.least_squares import Fit, Moments
from litgpt_whittle.repair.basis import norm_weight, set_norm_weight
from litgpt_whittle.repair.cut import linear_names, teacher_rows
from litgpt_whittle.tensors import sums_dtype

ROWS = 2**12
"""Rows of a weight that are converted to float64 at a time"""

Find = Callable[[bool, torch.Tensor], Fit]
"""Function that regresses the teacher's normalised stream on the student's, given whether to fit an intercept, and a
metric for the errors"""


def fit_readers(block: Block, takes: Plan, teacher: Block, part: str, find: Find) -> dict[str, Fit]:
    """Fit all input projections of `attn` or `mlp`, in place; return the regression used for each."""
    names = [name for name in linear_names(takes, "reading") if name.startswith(part)]
    rows = {name: teacher_rows(takes, name, teacher) for name in names}
    wide = torch.cat([weight for weight, _ in rows.values()])
    metric = _gram(wide)
    found: dict[bool, Fit] = {}
    for name, (weight, bias) in rows.items():
        module = block.get_submodule(name)
        intercept = bias is not None
        if intercept not in found:
            found[intercept] = find(intercept, metric)
        module.weight.copy_(weight.float() @ found[intercept].weight.float())
        if intercept:
            module.bias.copy_(bias + weight.float() @ found[intercept].bias.float())
    return {name: found[bias is not None] for name, (_, bias) in rows.items()}


def fit_head(head: nn.Linear, wide: nn.Linear, find: Find) -> None:
    """Fit an untied LM head to the teacher's, in place."""
    weight, intercept = wide.weight.float(), wide.bias is not None
    # softmax is invariant to a constant added to all logits
    found = find(intercept, _gram(weight, weight.mean(0)))
    head.weight.copy_(weight @ found.weight.float())
    if intercept:
        head.bias.copy_(wide.bias + weight @ found.bias.float())


def fit_tied_norm(
    norm: nn.Module, embedding: torch.Tensor, wide: torch.Tensor, moments: Moments, held_out: Moments | None = None
) -> None:
    """Fit the weight of the final norm for a tied head, whose embedding stays fixed.

    With E the student's embedding, V the teacher's, z and y their final normalised streams, the factor w of the norm's
    weight that minimises ‖E diag(w) z − V y‖² solves (EᵀE ∘ Σzzᵀ) w = diag(Eᵀ V Σyzᵀ). If held-out moments are given,
    w is applied only if it decreases the error on them.
    """
    if norm_weight(norm) is None:
        return
    # softmax is invariant to a constant added to all logits
    ours, theirs = (weight.to(moments.zz.dtype) for weight in (embedding, wide))
    ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)

    def normal_equations(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
        zz, yz = moments.covariances(intercept=False)
        return (ours.T @ ours) * zz, ((ours.T @ theirs) @ yz).diagonal()

    gram, right = normal_equations(moments)
    factor = torch.linalg.solve(gram + 1e-6 * torch.diag(gram.diagonal().clamp_min(1e-30)), right)
    is_better = bool(torch.isfinite(factor).all())
    if is_better and held_out is not None:
        gram, right = normal_equations(held_out)
        # squared error up to a constant that does not depend on w
        fitted, unfitted = (float(w @ gram @ w - 2 * right @ w) for w in (factor, torch.ones_like(factor)))
        is_better = fitted < unfitted
    if is_better:
        set_norm_weight(norm, norm_weight(norm) * factor.to(norm.weight.dtype))
        if getattr(norm, "bias", None) is not None:
            norm.bias.mul_(factor.to(norm.bias.dtype))


def _gram(weight: torch.Tensor, centre: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Return WᵀW of a weight less `centre` in each row, in the dtype of sums, converting some rows at a time."""
    gram = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=sums_dtype(weight.device))
    for rows in weight.split(ROWS):
        rows = (rows - centre).to(gram.dtype)
        gram.addmm_(rows.T, rows)
    return gram
