"""Calibration tokens, batch by batch: an eighth of them held out, all of them spread over the processes.

Everything that is fitted needs sums over tokens and nothing else, so each process adds up its own batches, and the
sums are then added over the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from litgpt_whittle.errors import UserError
from litgpt_whittle.least_squares import Moments
from litgpt_whittle.processes import rank, world_size

Batch = slice
"""Windows of the calibration data"""


class Calibration:
    """Calibration windows.

    Args:
        windows: Token ids, shape (N, T).
        micro_batch_size: Windows per batch.
        device: Where to compute.

    Raises:
        UserError: If there are fewer than two windows: one to fit to and one to judge by.
    """

    def __init__(self, windows: torch.Tensor, micro_batch_size: int = 16, device: torch.device | str = "cpu") -> None:
        n = len(windows)
        check_n_windows(n)
        self.windows, self.device = windows, device
        self._first_held_out = n - max(n // 8, 1)
        self.all_batches = [
            slice(start, min(start + micro_batch_size, end))
            for begin, end in ((0, self._first_held_out), (self._first_held_out, n))
            for start in range(begin, end, micro_batch_size)
        ]
        self.batches = self.share(self.all_batches)

    @staticmethod
    def share(batches: Sequence[Batch]) -> Sequence[Batch]:
        """What this process has to do of these batches."""
        return batches[rank() :: world_size()]

    def is_held_out(self, batch: Batch) -> bool:
        """Whether these windows judge what was fitted to the others."""
        return batch.start >= self._first_held_out

    @property
    def shape(self) -> tuple[int, int]:
        """Windows and tokens of each."""
        return tuple(self.windows.shape)

    @property
    def n_fitted(self) -> int:
        """Tokens that are fitted to."""
        return self._first_held_out * self.windows.shape[1]

    def ids(self, batch: Batch) -> torch.Tensor:
        """Token ids on the device, shape (B, T)."""
        return self.windows[batch].to(self.device)

    def moments(
        self, n_in: int, n_out: int, pair: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[Moments, Moments]:
        """Adds up what `pair` gives as inputs (…, n_in) and outputs (…, n_out) of every batch, over all processes.

        Returns:
            The moments of the tokens to fit to, and of those held out.
        """
        fitted, held_out = Moments(n_in, n_out, self.device), Moments(n_in, n_out, self.device)
        for batch in self.batches:
            (held_out if self.is_held_out(batch) else fitted).add(*pair(batch))
        return fitted.over_processes(), held_out.over_processes()


def check_n_windows(n: int) -> None:
    """Refuses too few windows: one to fit to and one to judge by are needed.

    Raises:
        UserError: If there are fewer.
    """
    if n < 2:
        raise UserError(f"a repair needs at least 2 windows of calibration data, got {n}; raise repair.tokens")
