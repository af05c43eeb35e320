"""What training, scoring and caching take, in closed forms: floating-point operations, GPU-hours, network traffic."""

from dataclasses import dataclass

from litgpt.config import Config

from litgpt_whittle import SubNet, n_params
from litgpt_whittle.metrics import flops


@dataclass(frozen=True)
class GPU:
    """A kind of GPU."""

    name: str
    peak: float
    """Dense bf16 FLOP/s, the maker's figure"""
    fp32_peak: float
    """The same in fp32"""


H100 = GPU("H100", 989e12, 67e12)
A100 = GPU("A100", 312e12, 19.5e12)

UTILISATION = 0.4
"""The share of the peak that is assumed to be reached; `scale.py` compares it with what published runs reached"""


def forward_flops(model: Config | SubNet, seq_length: int) -> float:
    """FLOPs per token of one forward pass of a model or of a teacher's sub-network, as `metrics.flops` counts them."""
    subnet = model if isinstance(model, SubNet) else SubNet.full(model)
    return flops(subnet.teacher, subnet, seq_length)


def training_flops(
    student: Config | SubNet, seq_length: int, teacher: Config | None = None, activation_checkpointing: bool = False
) -> float:
    """FLOPs per token of a training step.

    The student runs forward once, or twice where its activations are computed again, and backward, which takes twice
    as much as forward; the teacher runs forward.
    """
    passes = 4 if activation_checkpointing else 3
    taught = 0 if teacher is None else forward_flops(teacher, seq_length)
    return passes * forward_flops(student, seq_length) + taught


def gpu_hours(n_flops: float, peak: float = H100.peak, utilisation: float = UTILISATION) -> float:
    """Hours of one GPU with so many FLOP/s at its peak."""
    return n_flops / (peak * utilisation) / 3600


def traffic(student: Config, n: int, strategy: str, n_accumulated: int, sharded_teacher: Config | None = None) -> float:
    """Bytes that each of n GPUs receives per micro-batch, in bf16-mixed.

    With "fsdp", weights come in bf16, for the forward and for the backward pass, those of a sharded teacher once; the
    gradients of a step are spread in fp32, once for all of its micro-batches. With "ddp", these go round twice.

    Args:
        student: The student's config.
        n: GPUs.
        strategy: "fsdp" or "ddp".
        n_accumulated: Micro-batches per step and GPU.
        sharded_teacher: The teacher's config, where it is spread over the GPUs.
    """
    own = n_params(student, SubNet.full(student))
    weights, gradients = (2 * 2 * own, 4 * own) if strategy == "fsdp" else (0, 2 * 4 * own)
    if sharded_teacher is not None:
        weights += 2 * n_params(sharded_teacher, SubNet.full(sharded_teacher))
    return (weights + gradients / n_accumulated) * (n - 1) / n
