"""Which networks a step of super-network training trains, by name through the group `litgpt_whittle.samplers`."""

from litgpt_whittle.samplers.base import Networks, Sampler
from litgpt_whittle.samplers.ours import (
    Alternate,
    InPlaceDistillation,
    RandomLinear,
    Sandwich,
    SizeWeighted,
    Standard,
    Uniform,
)

__all__ = [
    "Alternate",
    "InPlaceDistillation",
    "Networks",
    "RandomLinear",
    "Sampler",
    "Sandwich",
    "SizeWeighted",
    "Standard",
    "Uniform",
]
