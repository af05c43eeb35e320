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
    """Index of the teacher's layer"""
    before: float
    """Squared error of the student's hidden states after this block, relative to the teacher's, if the block is only
    sliced"""
    after: float
    """The same error with the repaired block"""
    left_as_cut: list[str] = field(default_factory=list)
    """Linear maps that keep their sliced weights"""


@dataclass
class Repaired:
    """A repaired student."""

    subnet: SubNet
    """Sub-network with the selected units"""
    weights: Weights
    layers: list[LayerReport]
    head: Errors | None
    """KL(teacher ‖ student) on held-out tokens before and after training the head, in nats per token"""
    refined: Errors | None
    """KL(teacher ‖ student) on held-out tokens before and after training all blocks jointly, in nats per token"""
    fitted: float | None
    """Final KL(teacher ‖ student) on fitted tokens, as many as there are held-out tokens, in nats per token"""
    basis_name: str
    """Kind of the basis: `pca` or `coordinates`"""
    basis: torch.Tensor
    """The student's channels as combinations of the teacher's, shape (n_embd_student, n_embd_teacher)"""
