"""Fits the LM head to what the teacher predicts, after the closed form has fitted it to the teacher's logits.

To least squares, the logit of a token that nobody expects is worth as much as that of the likeliest one. What a student
is judged by, how far its predictions are from the teacher's, has no closed form, but it is convex in the head: a few
passes over the final hidden states, which lie in scratch files already, come near its minimum, and no block runs. The
teacher tells a probability for every token of the vocabulary, so even few calibration tokens are hard to overfit.
"""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from litgpt_whittle.blocks import Outside
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.distillation.head import HeadInput, TeacherLogits, head_loss
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.repair.basis import norm_weight
from litgpt_whittle.repair.refine import Errors, refine
from litgpt_whittle.scratch import Scratch, Stream

TOKENS_PER_STEP = 256
NORM_TOKENS = 4_096
"""Tokens per pass where only the final norm is trained"""
RATE = 0.03
"""Learning rate, relative to the root mean square of the weights, so that the size of hidden states does not matter"""
OPTIMIZER_COPIES = 5
"""Numbers kept per weight while it is trained: itself, its gradient, Adam's two means, and what it was"""


class HeadRepair:
    """Trains a student's LM head towards the teacher's predictions.

    Where the head is the embedding, which has another use too, the weight of the final norm is trained instead.

    Args:
        ours: What lies outside the student's blocks, trained in place.
        theirs: The same of the teacher.
        student: The student's stream behind its last block.
        teacher: The teacher's.
        calibration: The tokens.
        tied: Whether the student's head is its embedding.
    """

    def __init__(
        self, ours: Outside, theirs: Outside, student: Stream, teacher: Stream, calibration: Calibration, tied: bool
    ) -> None:
        self.ours, self.theirs, self.student, self.teacher = ours, theirs, student, teacher
        self.calibration = calibration
        self.rates = _norm_rates(ours.norm) if tied else _head_rates(ours.head)
        # the weight of a norm is soon found; every token costs a pass through both heads
        self.n_tokens = min(calibration.n_fitted, NORM_TOKENS) if tied else calibration.n_fitted

    def fit(self, n_passes: int, scratch: Scratch | None = None, progress: bool = False) -> Errors | None:
        """Trains it, if it has anything to be trained.

        Every process takes the same steps.

        Returns:
            KL(teacher ‖ student) on held-out tokens, in nats per token, before and after.
        """
        if not self.rates:
            return None
        n, order = self.n_tokens, torch.Generator().manual_seed(0)
        rows = [rows for _ in range(n_passes) for rows in torch.randperm(n, generator=order).split(TOKENS_PER_STEP)]
        with tqdm(total=len(rows), desc="LM head", unit="step", disable=not progress) as bar:
            return refine(
                self.rates,
                len(rows),
                lambda step: self.divergence(rows[step]),
                self.error,
                bar,
                scratch=scratch,
                name="head",
            )

    def error(self) -> float:
        """Return the divergence on held-out tokens."""
        n, end = self.calibration.n_fitted, self.calibration.windows.numel()
        parts = torch.arange(n, end).split(TOKENS_PER_STEP)
        return sum(float(self.divergence(rows)) * len(rows) for rows in parts) / (end - n)

    def divergence(self, rows: torch.Tensor) -> torch.Tensor:
        """KL(teacher ‖ student) of some tokens, the mean in nats.

        Args:
            rows: The tokens' places in the calibration data, shape (n,).
        """
        ours, theirs = (
            HeadInput(outside.norm(stream.tokens(rows).to(self.calibration.device)), *_parameters(outside.head))
            for outside, stream in ((self.ours, self.student), (self.theirs, self.teacher))
        )
        softcap = self.ours.model.config.final_logit_softcapping
        told = TeacherLogits(theirs, softcap)
        return head_loss(ours, None, Objective(alpha=0.0, beta=1.0), told, softcap).loss


Rates = list[tuple[nn.Parameter, float]]
"""What is trained, and how fast"""


def _head_rates(head: nn.Linear) -> Rates:
    bias = [] if head.bias is None else [(head.bias, RATE)]  # which is in nats, as the logits are
    return [(head.weight, RATE * _size(head.weight)), *bias]


def _norm_rates(norm: nn.Module) -> Rates:
    weight = norm_weight(norm)
    return [] if weight is None else [(parameter, RATE * _size(weight)) for parameter in norm.parameters()]


def _size(weight: torch.Tensor) -> float:
    return float(weight.square().mean().sqrt())


def _parameters(head: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return head.weight, head.bias
