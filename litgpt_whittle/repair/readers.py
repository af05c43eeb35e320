"""Fits the maps that read the residual stream: all that lie behind one norm follow from one regression.

What such a map should give is what the teacher's gives: a linear function of the teacher's normalised stream. So that
stream is regressed once on the student's, and every map's weights are the teacher's times the solution; the LM head's
too, whose logits need not exist.
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

Find = Callable[[bool, torch.Tensor], Fit]
"""Regresses the teacher's normalised stream on the student's, with an intercept or not, errors weighed by a metric"""


def fit_readers(block: Block, takes: Plan, teacher: Block, part: str, find: Find) -> dict[str, Fit]:
    """Fits all maps of `attn` or `mlp` that read the stream, in place; gives the regression behind each."""
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
    """Fits an LM head that is not the embedding to the teacher's, in place."""
    weight, intercept = wide.weight.float(), wide.bias is not None
    # a softmax does not see what all logits have in common
    found = find(intercept, _gram(weight - weight.mean(0)))
    head.weight.copy_(weight @ found.weight.float())
    if intercept:
        head.bias.copy_(wide.bias + weight @ found.bias.float())


def fit_tied_norm(
    norm: nn.Module, embedding: torch.Tensor, wide: torch.Tensor, moments: Moments, held_out: Moments | None = None
) -> None:
    """Fits the weight w of the final norm where the head is the embedding, so that nothing else is free.

    With E the student's embedding, V the teacher's, z and y their final normalised streams, ‖E diag(w) z − V y‖² is
    least where (EᵀE ∘ Σzzᵀ) w = diag(Eᵀ V Σyzᵀ). Kept if it is better on held-out tokens, where there are any.
    """
    if norm_weight(norm) is None:
        return
    # a softmax does not see what all logits have in common
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
        # the error of w, but for what no w changes
        fitted, unfitted = (float(w @ gram @ w - 2 * right @ w) for w in (factor, torch.ones_like(factor)))
        is_better = fitted < unfitted
    if is_better:
        set_norm_weight(norm, norm_weight(norm) * factor.to(norm.weight.dtype))
        if getattr(norm, "bias", None) is not None:
            norm.bias.mul_(factor.to(norm.bias.dtype))


def _gram(weight: torch.Tensor) -> torch.Tensor:
    wide = weight.double() if weight.device.type == "cpu" else weight.float()
    return wide.T @ wide
