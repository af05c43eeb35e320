"""Samplers of sub-networks for super-network training, registered in the group `litgpt_whittle.samplers`."""

from litgpt_whittle.samplers.base import Networks, Sampler
from litgpt_whittle.samplers.schemes import (
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
