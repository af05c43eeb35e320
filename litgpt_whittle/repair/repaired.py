"""Results of a repair."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from litgpt_whittle.repair.refine import Errors
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import Weights


@dataclass
class LayerReport:
    """Held-out errors of a layer before and after its repair."""

    layer: int
    before: float
    """Relative squared error of the student's stream after this block, as sliced"""
    after: float
    """The same error, repaired"""
    left_as_cut: list[str] = field(default_factory=list)
    """Maps that were not fitted"""


@dataclass
class Repaired:
    """A repaired student."""

    subnet: SubNet
    """Sub-network with the selected units"""
    weights: Weights
    layers: list[LayerReport]
    head: Errors | None
    """KL(teacher ‖ student) on held-out tokens before and after the head's passes, in nats per token"""
    refined: Errors | None
    """The same before and after the passes that train all blocks jointly"""
    fitted: float | None
    """The same on as many fitted tokens, at the end"""
    basis_name: str
    basis: torch.Tensor
    """The student's channels as combinations of the teacher's, shape (n_embd_student, n_embd_teacher)"""
