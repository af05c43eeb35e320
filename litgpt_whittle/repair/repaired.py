"""Results of a repair."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from litgpt_whittle.repair.refine import Errors
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import Weights


@dataclass
class LayerReport:
    """What repairing a layer did, on held-out tokens."""

    layer: int
    before: float
    """Relative squared error of the student's stream behind this block, as it was sliced"""
    after: float
    """The same, repaired"""
    left_as_cut: list[str] = field(default_factory=list)
    """Maps that were not fitted"""


@dataclass
class Repaired:
    """A repaired student."""

    subnet: SubNet
    """Its sub-network, with the units that were chosen"""
    weights: Weights
    layers: list[LayerReport]
    head: Errors | None
    """KL(teacher ‖ student) on held-out tokens before and after the head's passes, in nats per token"""
    refined: Errors | None
    """The same before and after the passes that train all blocks together"""
    basis_name: str
    basis: torch.Tensor
    """The student's channels as combinations of the teacher's, shape (n_embd_student, n_embd_teacher)"""
