"""What training, scoring and caching take, in closed forms: floating-point operations, GPU-hours, network traffic."""

from dataclasses import dataclass

from litgpt.config import Config

from litgpt_whittle import SubNet
from litgpt_whittle.metrics import flops


@dataclass(frozen=True)
class GPU:
    """A kind of GPU."""

    name: str
    peak: float
    """Dense bf16 FLOP/s, the maker's figure"""


H100 = GPU("H100", 989e12)
A100 = GPU("A100", 312e12)

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


def gpu_hours(n_flops: float, gpu: GPU = H100, utilisation: float = UTILISATION) -> float:
    """Hours of one GPU."""
    return n_flops / (gpu.peak * utilisation) / 3600
