"""Train the LM head on the teacher's predictions, after the closed-form fit to the teacher's logits.

Least squares weighs the logit of an unlikely token as much as that of the most likely one. The quantity of interest,
KL(teacher ‖ student), has no closed-form minimum, but is convex in the head. A few passes over the final hidden states,
which are in scratch files already, come close to the minimum without running any block. The teacher gives a probability
for every token of the vocabulary, so even few calibration tokens are hard to overfit.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from tqdm import tqdm

from litgpt_whittle.blocks import NonBlockModules
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.distillation.head import HeadInput, TeacherLogits, head_loss
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.repair.basis import norm_weight
from litgpt_whittle.repair.refine import Errors, refine
from litgpt_whittle.scratch import Scratch, SharedActivations

TOKENS_PER_STEP = 256
NORM_TOKENS = 4_096
"""Tokens per pass if only the final norm is trained"""
RATE = 0.03
"""Learning rate relative to the RMS of the weights, which makes it independent of the scale of the hidden states"""
OPTIMIZER_COPIES = 5
"""Values stored per weight during training: the weight, its gradient, Adam's two moments, and the initial weight"""
STEP_COPIES = 2
"""Temporary copies of the largest tensor during a step of Adam; for blocks, the estimate counts a whole block as one"""


class HeadRepair:
    """Trains a student's LM head on the teacher's predictions.

    If the head is tied to the embedding, the final norm is trained instead.

    Args:
        ours: The student's modules outside the blocks, trained in place.
        theirs: The teacher's modules outside the blocks.
        student: The student's hidden states after its last block.
        teacher: The teacher's hidden states after its last block.
        calibration: The calibration tokens.
        tied: True if the student's head is tied to its embedding.
    """

    def __init__(
        self,
        ours: NonBlockModules,
        theirs: NonBlockModules,
        student: SharedActivations,
        teacher: SharedActivations,
        calibration: Calibration,
        tied: bool,
    ) -> None:
        self.ours, self.theirs, self.student, self.teacher = ours, theirs, student, teacher
        self.calibration = calibration
        self.rates = _norm_rates(ours.norm) if tied else _head_rates(ours.head)
        # a norm's weight converges fast, and every token costs a forward pass through both heads
        counted = calibration.counted(calibration.fitted_windows)
        self.fitted = counted[:NORM_TOKENS] if tied else counted

    def fit(self, n_passes: int, scratch: Scratch | None = None, progress: bool = False) -> Errors | None:
        """Train for `n_passes` passes over the fitted tokens; every process takes the same steps.

        Returns:
            KL(teacher ‖ student) on held-out tokens before and after, in nats per token; None if nothing is trainable.
        """
        if not self.rates:
            return None
        n, order = len(self.fitted), torch.Generator().manual_seed(0)
        passes = [self.fitted[torch.randperm(n, generator=order)] for _ in range(n_passes)]
        rows = [rows for each in passes for rows in each.split(TOKENS_PER_STEP)]
        with tqdm(total=len(rows), desc="LM head", unit="step", disable=not progress) as bar:
            loss = lambda step: self.divergence(rows[step])
            return refine(self.rates, loss, self.error, bar, scratch=scratch, name="head")

    def error(self, windows: range | None = None) -> float:
        """Return KL(teacher ‖ student) on these windows, by default held-out ones, in nats per token; NaN for none."""
        positions = self.calibration.counted(windows or self.calibration.held_out_windows)
        parts = positions.split(TOKENS_PER_STEP)
        return sum(float(self.divergence(rows)) * len(rows) for rows in parts) / (len(positions) or math.nan)

    def divergence(self, rows: torch.Tensor) -> torch.Tensor:
        """Return KL(teacher ‖ student) on these tokens, in nats per token.

        Args:
            rows: Positions of the tokens in the calibration data, all windows concatenated; shape (n,).
        """
        streams = (stream.tokens(rows) for stream in (self.student, self.teacher))
        return divergence(self.ours, self.theirs, *streams)


def divergence(
    ours: NonBlockModules, theirs: NonBlockModules, student: torch.Tensor, teacher: torch.Tensor
) -> torch.Tensor:
    """Return KL(teacher ‖ student) in nats per token.

    Args:
        ours: The student's modules outside the blocks.
        theirs: The teacher's modules outside the blocks.
        student: The student's hidden states after its last block, shape (…, n_embd_student).
        teacher: The teacher's hidden states after its last block, shape (…, n_embd_teacher).
    """
    student_head, teacher_head = (
        HeadInput(outside.norm(stream), outside.head.weight, outside.head.bias)
        for outside, stream in ((ours, student), (theirs, teacher))
    )
    softcap = ours.model.config.final_logit_softcapping
    targets = TeacherLogits(teacher_head, softcap)
    return head_loss(student_head, None, Objective(alpha=0.0, beta=1.0), targets, softcap).loss


Rates = list[tuple[torch.Tensor, float]]
"""Trained parameters with their learning rates"""


def _head_rates(head: nn.Linear) -> Rates:
    bias = [] if head.bias is None else [(head.bias, RATE)]  # in nats like the logits, so not scaled
    return [(head.weight, RATE * _size(head.weight)), *bias]


def _norm_rates(norm: nn.Module) -> Rates:
    weight = norm_weight(norm)
    return [] if weight is None else [(parameter, RATE * _size(weight)) for parameter in norm.parameters()]


def _size(weight: torch.Tensor) -> float:
    return float(weight.square().mean().sqrt())
