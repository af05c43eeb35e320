"""LM head and losses by Liger's fused Triton kernels (https://github.com/linkedin/Liger-Kernel), on NVIDIA GPUs.

An alternative to `litgpt_whittle.distillation.head` for two losses: the cross-entropy (`LigerFusedLinearCrossEntropy`)
and the forward KL divergence (`LigerFusedLinearJSD` with β = 0). If an objective has both, each computes the student's
logits. The gradient of the head is summed in fp32 over Liger's chunks and then rounded to the dtype of the matmuls.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from litgpt.config import Config

from litgpt_whittle.distillation.head import HeadInput, HeadLosses, SoftTargets, TeacherLogits, matmul_dtype
from litgpt_whittle.distillation.losses import forward_kl
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.errors import UserError
from litgpt_whittle.extras import require
from litgpt_whittle.tensors import IGNORE_INDEX

OUR_HEAD = "use --distill.head chunked"


def check_liger(objective: Objective, has_cache: bool, device: torch.device) -> None:
    """Check that Liger's kernels compute an objective on a device.

    Args:
        objective: The objective at any time of the training.
        has_cache: True if the teacher's targets come from a cache.
        device: Device of the training.

    Raises:
        UserError: If the kernels do not compute the objective, or if a package is missing.
    """
    if any(term.loss is not forward_kl for term in objective.terms):
        names = [getattr(term.loss, "__name__", str(term.loss)) for term in objective.terms]
        raise UserError(
            f"distill.head liger computes only the cross-entropy and forward_kl, got {' + '.join(names)}; {OUR_HEAD}"
        )
    if has_cache:
        raise UserError(f"distill.head liger needs a teacher that runs on every batch, got a teacher_cache; {OUR_HEAD}")
    if device.type != "cuda":
        raise UserError(f"distill.head liger needs an NVIDIA GPU, got the device {device.type!r}; {OUR_HEAD}")
    for package in ("triton", "liger_kernel"):
        require(package, "liger", "distill.head liger")


def check_liger_models(models: Iterable[Config]) -> None:
    """Check that Liger's kernels compute the models' heads: without bias and softcap, of one vocabulary.

    Args:
        models: The student's config, and the teacher's if there is one.

    Raises:
        UserError: If a head has a bias or a softcap, or if the vocabularies differ in size.
    """
    models = list(models)
    sizes = sorted({config.padded_vocab_size for config in models})
    found = {
        "a bias": any(config.lm_head_bias for config in models),
        "a softcap": any(config.final_logit_softcapping is not None for config in models),
        f"vocabularies of {' and '.join(map(str, sizes))} entries": len(sizes) > 1,
    }
    if unsupported := [name for name, is_found in found.items() if is_found]:
        raise UserError(
            "distill.head liger computes only LM heads without bias and softcap, and of one vocabulary, got "
            f"{' and '.join(unsupported)}; {OUR_HEAD}"
        )


@torch.compiler.disable
def liger_loss(
    head_input: HeadInput, targets: torch.Tensor, objective: Objective, teacher: SoftTargets | None
) -> HeadLosses:
    """Return the losses of `head_loss`, averaged over the tokens whose target is not `IGNORE_INDEX`.

    Args:
        head_input: The student's hidden states (B, T, n_embd) and head.
        targets: Next tokens, shape (B, T).
        objective: An objective that `check_liger` accepts. If its alpha is 0, the cross-entropy is not computed and
            returned as NaN.
        teacher: A `TeacherLogits`; if None, the loss has no distillation term.
    """
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    dtype, t = matmul_dtype(head_input.hidden), objective.temperature
    exact = torch.promote_types(dtype, torch.float32)
    ce, distill = (head_input.hidden.new_full((), value, dtype=exact) for value in (torch.nan, 0.0))
    loss = torch.zeros_like(distill)
    with torch.autocast(head_input.hidden.device.type, enabled=False):
        hidden, weight = head_input.hidden.flatten(0, 1).to(dtype), head_input.weight.to(dtype)
        labels = targets.flatten()
        if objective.alpha:
            cross_entropy = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, accum_dtype=exact)
            ce = cross_entropy(weight, hidden, labels).to(exact)
            loss = loss + objective.alpha * ce
        if objective.beta and teacher is not None:
            assert isinstance(teacher, TeacherLogits), "checked by `check_liger`"
            divergence = LigerFusedLinearJSD(0.0, IGNORE_INDEX, t, accum_dtype=exact)
            total = sum(term.weight for term in objective.terms)
            distill = total * divergence(hidden, weight, teacher.hidden, teacher.weight, labels)
            loss = loss + objective.beta * t**2 * distill
    return HeadLosses(loss, ce.detach(), distill.detach())
