"""Closed-form costs of training, scoring and caching: floating-point operations, GPU-hours, network traffic."""

from dataclasses import dataclass

from litgpt.config import Config

from litgpt_whittle import SubNet, n_params
from litgpt_whittle.metrics import flops


@dataclass(frozen=True)
class GPU:
    """Name and peak speed of a GPU."""

    name: str
    peak: float
    """Dense bf16 FLOP/s, from the vendor's data sheet"""
    fp32_peak: float
    """Dense fp32 FLOP/s"""


H100 = GPU("H100", 989e12, 67e12)
A100 = GPU("A100", 312e12, 19.5e12)

UTILISATION = 0.4
"""Assumed share of the peak FLOP/s; `scale.py` compares it with published runs"""


def forward_flops(model: Config | SubNet, seq_length: int) -> float:
    """Return the forward FLOPs per token of a model or of a teacher's sub-network, as `metrics.flops` counts them."""
    subnet = model if isinstance(model, SubNet) else SubNet.full(model)
    return flops(subnet.teacher, subnet, seq_length)


def training_flops(
    student: Config | SubNet, seq_length: int, teacher: Config | None = None, activation_checkpointing: bool = False
) -> float:
    """Return the FLOPs per token of a training step.

    The student runs forward once, or twice with activation checkpointing, and backward, which costs as much as two
    forward passes; the teacher runs forward.
    """
    passes = 4 if activation_checkpointing else 3
    taught = 0 if teacher is None else forward_flops(teacher, seq_length)
    return passes * forward_flops(student, seq_length) + taught


def gpu_hours(n_flops: float, peak: float = H100.peak, utilisation: float = UTILISATION) -> float:
    """Return the GPU-hours for these FLOPs on a GPU with this peak FLOP/s."""
    return n_flops / (peak * utilisation) / 3600


def traffic(student: Config, n: int, strategy: str, n_accumulated: int, sharded_teacher: Config | None = None) -> float:
    """Return the bytes that each of n GPUs receives per micro-batch, in bf16-mixed.

    With "fsdp", the student's weights are gathered in bf16 for both passes, those of a sharded teacher once; gradients
    are reduced in fp32, once per step for all of its micro-batches. With "ddp", gradients travel twice.

    Args:
        student: The student's config.
        n: GPUs.
        strategy: "fsdp" or "ddp".
        n_accumulated: Micro-batches per step and GPU.
        sharded_teacher: The teacher's config if it is sharded over the GPUs.
    """
    own = n_params(student, SubNet.full(student))
    weights, gradients = (2 * 2 * own, 4 * own) if strategy == "fsdp" else (0, 2 * 4 * own)
    if sharded_teacher is not None:
        weights += 2 * n_params(sharded_teacher, SubNet.full(sharded_teacher))
    return (weights + gradients / n_accumulated) * (n - 1) / n
