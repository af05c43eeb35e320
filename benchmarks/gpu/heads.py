"""Measure time and memory of LM head and losses with gradients, against the plain formula and Liger's kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench import Bench

from litgpt_whittle.distillation.head import HeadInput, TeacherLogits, head_loss
from litgpt_whittle.distillation.liger import liger_loss
from litgpt_whittle.distillation.objective import Objective

OBJECTIVES = {"ce": Objective(), "kl": Objective(0.0, 1.0, 0.9), "ce_kl": Objective(0.2, 0.8, 0.9)}
SIZES = {"v50k": (50_304, 1024, 2048, 16_384), "v128k": (128_256, 2048, 4096, 8192)}
"""Vocabulary, channels of student and teacher, tokens"""


class Inputs(NamedTuple):
    """Inputs of the losses; the hidden states and weights of the student have gradients."""

    student: HeadInput
    teacher: HeadInput
    targets: torch.Tensor  # (1, N)


Way = Callable[[], torch.Tensor]
"""Function that returns the loss to differentiate"""


def head(bench: Bench) -> Iterator[dict]:
    """Time each loss for two vocabularies, in several chunk sizes."""
    for case, sizes in SIZES.items():
        inputs = make_inputs(bench, *bench.size(sizes, (512, 32, 64, 128)))
        found: dict[str, float] = {}
        for name, way in ways(inputs, bench).items():
            figures = measure(way, inputs, bench)
            found |= {f"{case}_{name}_{figure}": value for figure, value in figures.items()}
        yield found
        yield {
            f"{case}_{task}_over_liger": found[f"{case}_{own}_{task}_ms"] / found[f"{case}_liger_{task}_ms"]
            for task, own in {"ce": "ours", "kl": "compiled", "ce_kl": "compiled"}.items()  # as in `litgpt distill`
            if {f"{case}_{own}_{task}_ms", f"{case}_liger_{task}_ms"} <= found.keys()
        }
        del inputs  # free them before the next inputs are made


def make_inputs(bench: Bench, n_vocab: int, n_embd: int, n_embd_teacher: int, n: int) -> Inputs:
    """Return random hidden states, weights and targets in bf16."""
    torch.manual_seed(0)

    def half(width: int) -> HeadInput:
        hidden = torch.randn(1, n, width, device=bench.device, dtype=torch.bfloat16)
        weight = torch.randn(n_vocab, width, device=bench.device, dtype=torch.bfloat16).mul_(0.02)
        return HeadInput(hidden, weight, None)

    student = half(n_embd)
    for tensor in student[:2]:
        tensor.requires_grad_()
    return Inputs(student, half(n_embd_teacher), torch.randint(n_vocab, (1, n), device=bench.device))


def ways(inputs: Inputs, bench: Bench) -> dict[str, Way]:
    """Return all implementations of the losses, by name."""
    found: dict[str, Way] = {}
    is_cuda = bench.device.type == "cuda"
    for task, objective in OBJECTIVES.items():
        found[f"ours_{task}"] = ours(inputs, objective)
        found[f"plain_{task}"] = lambda objective=objective: plain(inputs, objective)
        if is_cuda and objective.beta:
            found[f"compiled_{task}"] = ours(inputs, objective, compiles_scores=True)
        if is_cuda and importlib.util.find_spec("liger_kernel"):
            found[f"liger_{task}"] = liger(inputs, task, objective)
            found[f"option_{task}"] = lambda objective=objective: option(inputs, objective)
    for chunk in bench.size((512, 1024, 2048, 4096), (32, 64)):
        found[f"ours_ce_kl_in_{chunk}"] = ours(inputs, OBJECTIVES["ce_kl"], chunk, is_cuda)
    return found


def ours(inputs: Inputs, objective: Objective, chunk_size: int | None = None, compiles_scores: bool = False) -> Way:
    """Return the loss in chunks of tokens, by default of the project's own chunk size."""

    def way() -> torch.Tensor:
        teacher = TeacherLogits(inputs.teacher) if objective.beta else None
        options = {"chunk_size": chunk_size, "compiles_scores": compiles_scores}
        return head_loss(inputs.student, inputs.targets, objective, teacher, **options).loss

    return way


def plain(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """Return the loss by PyTorch's own functions on whole logits in fp32."""
    logits = F.linear(inputs.student.hidden[0], inputs.student.weight).float()  # (N, V)
    loss = objective.alpha * F.cross_entropy(logits, inputs.targets[0]) if objective.alpha else 0.0
    if not objective.beta:
        return loss
    t = objective.temperature
    with torch.no_grad():
        log_q = F.log_softmax(F.linear(inputs.teacher.hidden[0], inputs.teacher.weight).float() / t, -1)
    kl = F.kl_div(F.log_softmax(logits / t, -1), log_q, reduction="batchmean", log_target=True)
    return loss + objective.beta * t**2 * kl


def liger(inputs: Inputs, task: str, objective: Objective) -> Way:
    """Return Liger's loss for a task: its Triton kernels, and for the sum its compiled chunks."""
    hidden, weight, targets = inputs.student.hidden[0], inputs.student.weight, inputs.targets[0]
    teacher, t = (inputs.teacher.hidden[0], inputs.teacher.weight), objective.temperature
    if task == "ce":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        return lambda: fused(weight, hidden, targets)
    if task == "kl":
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=0.0, temperature=t)
        return lambda: fused(hidden, weight, *teacher, targets)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Liger does not multiply by T²
    weights = {"weight_hard_loss": objective.alpha, "weight_soft_loss": objective.beta * t**2}
    chunks = LigerFusedLinearJSDLoss(beta=0.0, temperature=t, compiled=True, **weights)
    return lambda: chunks(hidden, weight, *teacher, targets)


def option(inputs: Inputs, objective: Objective) -> torch.Tensor:
    """Return the loss as `litgpt distill --distill.head liger` computes it, with the head's gradient summed in fp32."""
    teacher = TeacherLogits(inputs.teacher) if objective.beta else None
    return liger_loss(inputs.student, inputs.targets, objective, teacher).loss


def measure(way: Way, inputs: Inputs, bench: Bench) -> dict[str, float | str]:
    """Return the milliseconds of a loss with its gradients, and its memory."""

    def step() -> None:
        for tensor in inputs.student[:2]:
            tensor.grad = None
        way().backward()

    is_gpu = bench.device.type == "cuda"
    try:
        bench.forget_peak()
        before = torch.cuda.memory_allocated() if is_gpu else 0
        found: dict[str, float | str] = {"ms": bench.seconds(step, 5, 2) * 1e3}
    except Exception as error:  # out of memory, or a kernel that the card does not support: the others can be measured
        return {"error": f"{type(error).__name__}: {str(error)[:120]}"}
    return found | ({"gb": (torch.cuda.max_memory_allocated() - before) / 1e9} if is_gpu else {})
