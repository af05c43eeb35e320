"""Costs of a pipeline's stages: tokens, floating-point operations and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from litgpt_whittle.files import readable_size

if TYPE_CHECKING:
    from litgpt_whittle.commands.cache_teacher import CacheTeacherConfig
    from litgpt_whittle.commands.distill import DistillConfig
    from litgpt_whittle.commands.search import SearchConfig


@dataclass(frozen=True)
class Cost:
    """Upper bound of a stage's cost."""

    name: str
    tokens: int
    forward: float
    """FLOPs of forward passes without gradients"""
    training: float = 0.0
    """FLOPs of forward and backward passes with gradients"""
    weights: int = 0
    """Bytes of models and of a repair's moment matrices per device, without activations, gradients and the optimizer"""

    def seconds(self, speed: Speed) -> float:
        """Return the stage's time in seconds at a machine's speed."""
        return self.forward / speed.forward + self.training / speed.training


@dataclass(frozen=True)
class Speed:
    """Speed of all devices of this machine together, in FLOPs per second."""

    forward: float
    training: float


def n_shards(args: SearchConfig | CacheTeacherConfig | DistillConfig) -> int | str:
    """Return the number of devices that share the teacher's weights, or "auto"."""
    return args.devices if args.teacher_placement == "sharded" else 1


def cost_table(found: list[Cost], speed: Speed) -> list[list[str]]:
    """Return the stages' costs as a table, headings first."""
    rows = [["stage", "tokens", "FLOPs", "weights per device", "about"]]
    for cost in found:
        flop, weights = cost.forward + cost.training, readable_size(cost.weights)
        rows.append([cost.name, f"{cost.tokens:,}", f"{flop:.2g}", weights, duration(cost.seconds(speed))])
    total = sum(cost.seconds(speed) for cost in found)
    flop = sum(cost.forward + cost.training for cost in found)
    largest = readable_size(max(cost.weights for cost in found))
    return [*rows, ["all", f"{sum(cost.tokens for cost in found):,}", f"{flop:.2g}", largest, duration(total)]]


def duration(seconds: float) -> str:
    """Format seconds in a readable unit."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
