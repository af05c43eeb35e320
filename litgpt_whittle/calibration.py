"""Calibration tokens, batch by batch, spread over the processes.

They have three parts: most are fitted to, an eighth chooses the strength of each regression's ridge (and is fitted to
once that is chosen), and a sixteenth is held out: nothing is ever fitted to it, so it can judge the result.

Everything that is fitted needs sums over tokens and nothing else, so each process adds up its own batches, and the
sums are then added over the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from litgpt_whittle.errors import UserError
from litgpt_whittle.least_squares import Moments
from litgpt_whittle.processes import free_memory, n_sharing, rank, world_size

CACHE_PARTS = 8
"""Each cache of activations may take this part of the free memory"""

FLOAT32_TOKENS_PER_INPUT = 16
"""Minimum number of tokens per input for products in float32; sums stay in float64 on a CPU"""

Batch = slice
"""Windows of the calibration data"""


class Calibration:
    """Calibration windows.

    Args:
        windows: Token ids, shape (N, T).
        micro_batch_size: Windows per batch.
        device: Where to compute.

    Raises:
        UserError: If there are fewer than three windows, one for each part.
    """

    def __init__(self, windows: torch.Tensor, micro_batch_size: int = 16, device: torch.device | str = "cpu") -> None:
        n = len(windows)
        check_n_windows(n)
        self.windows, self.device = windows, device
        self._first_held_out = n - max(n // 16, 1)
        self._first_tuning = self._first_held_out - max(n // 8, 1)
        self.all_batches = [
            slice(start, min(start + micro_batch_size, end))
            for begin, end in (
                (0, self._first_tuning),
                (self._first_tuning, self._first_held_out),
                (self._first_held_out, n),
            )
            for start in range(begin, end, micro_batch_size)
        ]
        self.batches = self.share(self.all_batches)

    @staticmethod
    def share(batches: Sequence[Batch]) -> Sequence[Batch]:
        """What this process has to do of these batches."""
        return batches[rank() :: world_size()]

    def is_held_out(self, batch: Batch) -> bool:
        """Return whether these windows are never fitted to."""
        return batch.start >= self._first_held_out

    def is_tuning(self, batch: Batch) -> bool:
        """Return whether these windows choose the ridges."""
        return self._first_tuning <= batch.start < self._first_held_out

    @property
    def fitted_batches(self) -> list[Batch]:
        """This process's batches that are fitted to, those that choose the ridges among them."""
        return [batch for batch in self.batches if not self.is_held_out(batch)]

    @property
    def tuning_batches(self) -> list[Batch]:
        """This process's batches that choose the ridges."""
        return [batch for batch in self.batches if self.is_tuning(batch)]

    @property
    def held_out_batches(self) -> list[Batch]:
        """This process's batches that are never fitted to."""
        return [batch for batch in self.batches if self.is_held_out(batch)]

    @property
    def shape(self) -> tuple[int, int]:
        """Windows and tokens of each."""
        return tuple(self.windows.shape)

    @property
    def n_fitted(self) -> int:
        """Number of tokens that are fitted to, those that tune among them."""
        return self._first_held_out * self.windows.shape[1]

    def ids(self, batch: Batch) -> torch.Tensor:
        """Token ids on the device, shape (B, T)."""
        return self.windows[batch].to(self.device)

    def cached(self, compute: Callable[[Batch], torch.Tensor]) -> Callable[[Batch], torch.Tensor]:
        """Wrap a function of a batch so that its values are kept on the device while a share of free memory lasts."""
        kept: dict[int, torch.Tensor] = {}
        budget = free_memory(torch.device(self.device), n_sharing(torch.device(self.device))) // CACHE_PARTS

        def recall(batch: Batch) -> torch.Tensor:
            nonlocal budget
            if batch.start in kept:
                return kept[batch.start]
            value = compute(batch)
            if value.numel() * value.element_size() <= budget:
                budget -= value.numel() * value.element_size()
                kept[batch.start] = value
            return value

        return recall

    def moments(
        self, n_in: int, n_out: int, examples: Callable[[Batch], tuple[torch.Tensor, ...]]
    ) -> tuple[Moments, Moments]:
        """Add up the moments of every batch that is fitted to, over all processes.

        Args:
            n_in: Size of the inputs.
            n_out: Size of the outputs.
            examples: Gives a batch's inputs (…, n_in), outputs (…, n_out) and, where they differ, weights (…).

        Returns:
            The moments of the tokens to fit to, and of those that choose the ridge.
        """
        # rounded products are noise far below the data's own where there are many tokens for each input
        rough = self.n_fitted >= FLOAT32_TOKENS_PER_INPUT * n_in
        fitted, tuning = (Moments(n_in, n_out, self.device, rough=rough) for _ in range(2))
        for batch in self.fitted_batches:
            (tuning if self.is_tuning(batch) else fitted).add(*examples(batch))
        return fitted.over_processes(), tuning.over_processes()


def check_n_windows(n: int) -> None:
    """Refuse too few windows: fitting, choosing ridges and judging need one each.

    Raises:
        UserError: If there are fewer.
    """
    if n < 3:
        raise UserError(f"a repair needs at least 3 windows of calibration data, got {n}; raise repair.tokens")
