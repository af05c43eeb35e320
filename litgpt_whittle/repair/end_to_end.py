"""Train all blocks of a repaired student jointly, on the calibration tokens.

The closed form fits one linear map at a time, but nonlinear contributions of dropped layers and neurons can only be
recovered by training the maps jointly. The targets are the teacher's predictions. The teacher does not run again, since
its final hidden states are in the scratch files of the sequential repair. Leading student blocks that are copies of the
teacher's do not run again either. The embedding, and a head that is tied to it, are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from litgpt.model import Block
from tqdm import tqdm

from litgpt_whittle.blocks import NonBlockModules
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.repair.head import divergence
from litgpt_whittle.repair.refine import Errors, refine
from litgpt_whittle.scratch import Scratch, SharedActivations

TOKENS_PER_STEP = 512
"""Tokens per step, but at least one window; small, since calibration tokens are few"""

WARMUP = 0.1
"""Fraction of the steps in which the learning rate rises"""


class EndToEnd:
    """Trains a student's blocks, final norm and untied head towards the teacher's predictions.

    Args:
        ours: The student's modules outside the blocks, trained in place.
        theirs: The teacher's modules outside the blocks.
        blocks: The student's blocks except leading copies of the teacher's, trained in place.
        args: Arguments of each block besides the hidden states.
        start: The student's hidden states before the first of these blocks.
        teacher: The teacher's hidden states after its last block.
        calibration: The calibration tokens.
        tied: True if the student's head is tied to its embedding.
    """

    def __init__(
        self,
        ours: NonBlockModules,
        theirs: NonBlockModules,
        blocks: Sequence[Block],
        args: Sequence[tuple],
        start: SharedActivations,
        teacher: SharedActivations,
        calibration: Calibration,
        tied: bool,
    ) -> None:
        self.ours, self.theirs, self.blocks, self.args = ours, theirs, blocks, args
        self.start, self.teacher, self.calibration = start, teacher, calibration
        parts = [*blocks, ours.norm, *([] if tied else [ours.head])]
        self.parameters = [parameter for part in parts for parameter in part.parameters()]

    def fit(self, n_passes: float, lr: float, scratch: Scratch | None = None, progress: bool = False) -> Errors:
        """Train for `n_passes` passes over the fitted tokens; every process takes the same steps.

        Returns:
            KL(teacher ‖ student) on held-out tokens before and after, in nats per token.
        """
        candidates = self.calibration.training_windows
        per_step = max(TOKENS_PER_STEP // self.calibration.shape[1], 1)
        n_steps = max(round(n_passes * len(candidates) / per_step), 1)
        order = torch.Generator().manual_seed(0)
        windows: list[int] = []
        while len(windows) < n_steps * per_step:
            windows += candidates[torch.randperm(len(candidates), generator=order)].tolist()

        def loss(step: int) -> torch.Tensor:
            own = windows[step * per_step : (step + 1) * per_step]
            parts = [self.divergence(slice(i, i + 1)) for i in own]
            return cast(torch.Tensor, sum(part * n for part, n in parts)) / max(sum(n for _, n in parts), 1)

        rates = [(parameter, lr) for parameter in self.parameters]
        with tqdm(total=n_steps, desc="end to end", unit="step", disable=not progress) as bar:
            return refine(rates, loss, self.error, bar, warmup=WARMUP, max_norm=1.0, scratch=scratch, name="end-to-end")

    def error(self, windows: range | None = None) -> float:
        """Return KL(teacher ‖ student) on these windows, by default held-out ones, in nats per token; NaN for none."""
        windows = windows or self.calibration.held_out_windows
        with torch.no_grad():
            parts = [self.divergence(slice(i, i + 1)) for i in windows]
            return sum(float(part) * n for part, n in parts) / (sum(n for _, n in parts) or math.nan)

    def divergence(self, windows: slice) -> tuple[torch.Tensor, int]:
        """Return KL(teacher ‖ student) on these windows, in nats per token that counts, and the number of those."""
        stream, teacher = self.start[windows], self.teacher[windows]
        for block, args in zip(self.blocks, self.args):
            stream = block(stream, *args)
        if (counts := self.calibration.counts(windows)) is not None:
            stream, teacher = stream[counts], teacher[counts]
        return divergence(self.ours, self.theirs, stream, teacher), stream[..., 0].numel()
