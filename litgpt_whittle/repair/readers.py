"""Fit input projections: one regression per norm fits all projections after it.

The targets are the outputs of the teacher's projections, which are linear functions of the teacher's normalised hidden
states. These states are regressed once on the student's; the weight of every projection is the teacher's weight times
the solution. This includes the LM head, without computing any logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from litgpt.model import Block
from torch import nn

from litgpt_whittle.index_plan import SlicePlan
from litgpt_whittle.least_squares import Fit, Moments, products
from litgpt_whittle.repair.basis import norm_weight, scale_norm_weight
from litgpt_whittle.repair.cut import linear_names, teacher_rows

Find = Callable[[bool, torch.Tensor], Fit]
"""Function that regresses the teacher's normalised hidden states on the student's. Its arguments are a flag to fit an
intercept, and a metric for the errors, shape (n_embd, n_embd)"""


def fit_readers(block: Block, slices: SlicePlan, teacher: Block, part: str, find: Find) -> dict[str, Fit]:
    """Fit all input projections of `attn` or `mlp`, in place; return the regression used for each."""
    names = [name for name in linear_names(slices, "reading") if name.startswith(part)]
    rows = {name: teacher_rows(slices, name, teacher) for name in names}
    wide = torch.cat([weight for weight, _ in rows.values()])
    metric = products(wide, wide)
    found: dict[bool, Fit] = {}
    for name, (weight, bias) in rows.items():
        module = block.get_submodule(name)
        intercept = bias is not None
        if intercept not in found:
            found[intercept] = find(intercept, metric)
        module.weight.copy_(weight.float() @ found[intercept].weight.float())
        if bias is not None:
            module.bias.copy_(bias + weight.float() @ found[intercept].bias.float())
    return {name: found[bias is not None] for name, (_, bias) in rows.items()}


def fit_head(head: nn.Linear, teacher: nn.Linear, find: Find) -> None:
    """Fit an untied LM head to the teacher's, in place."""
    weight, intercept = teacher.weight.float(), teacher.bias is not None
    # softmax is invariant to a constant added to all logits
    found = find(intercept, products(weight, weight, centred=True))
    head.weight.copy_(weight @ found.weight.float())
    if intercept:
        head.bias.copy_(teacher.bias + weight @ found.bias.float())


def fit_tied_norm(
    norm: nn.Module,
    embedding: torch.Tensor,
    teacher_embedding: torch.Tensor,
    moments: Moments,
    held_out: Moments | None = None,
) -> None:
    """Fit the weight of the final norm for a tied head, whose embedding stays fixed.

    Let E and V be the embeddings of student and teacher, and z and y their hidden states after the final norm. The
    factor w of the norm's weight that minimises ‖E diag(w) z − V y‖² solves (EᵀE ∘ Σzzᵀ) w = diag(Eᵀ V Σyzᵀ). If
    held-out moments are given, w is applied only if it decreases the error on them.
    """
    if norm_weight(norm) is None:
        return
    # softmax is invariant to a constant added to all logits
    ours = products(embedding, embedding, centred=True)
    across = ours if torch.equal(embedding, teacher_embedding) else products(embedding, teacher_embedding, centred=True)

    def normal_equations(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
        zz, yz = moments.covariances(intercept=False)
        return ours * zz, (across @ yz).diagonal()

    gram, right = normal_equations(moments)
    factor = torch.linalg.solve(gram + 1e-6 * torch.diag(gram.diagonal().clamp_min(1e-30)), right)
    is_better = bool(torch.isfinite(factor).all())
    if is_better and held_out is not None:
        gram, right = normal_equations(held_out)
        # squared error up to a constant that does not depend on w
        fitted, unfitted = (float(w @ gram @ w - 2 * right @ w) for w in (factor, torch.ones_like(factor)))
        is_better = fitted < unfitted
    if is_better:
        scale_norm_weight(norm, factor)
        bias = getattr(norm, "bias", None)
        if bias is not None:
            bias.mul_(factor.to(bias.dtype))
