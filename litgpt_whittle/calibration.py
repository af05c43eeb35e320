"""Batches of calibration tokens, distributed over the processes.

There are three parts. Most tokens are for fitting. One eighth, the tuning tokens, select the ridge strength of each
regression, and are then added to the fit. Held-out tokens evaluate the result; nothing is ever fitted to them. They
come from the validation data, since other calibration text may continue the documents that were used for fitting.
Without validation data, they are the last 1/16 of the calibration tokens.

Regressions only need sums over tokens, so each process accumulates its own batches, and the sums are then reduced over
all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from litgpt_whittle.errors import UserError
from litgpt_whittle.least_squares import Moments
from litgpt_whittle.processes import free_memory, n_sharing, rank, world_size
from litgpt_whittle.tensors import to_device

CACHE_PARTS = 8
"""Each cache of activations may use 1/CACHE_PARTS of the free memory"""

FLOAT32_TOKENS_PER_INPUT = 16
"""Number of fitted tokens per input feature from which products are computed in float32; on a CPU, sums stay in
float64"""

HELD_OUT, LEAST_HELD_OUT = 16, 4096
"""Calibration tokens per held-out token, and the minimum number of held-out tokens from validation data; the minimum
never exceeds a quarter of the calibration tokens"""

Batch = slice
"""Slice of the calibration windows"""


class BatchCache:
    """Cache of one tensor per batch, for as many batches as fit into a byte budget.

    `get` takes the function at every call. A stored function that refers to the cache's owner would form a reference
    cycle, which frees its memory only at the next garbage collection.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._kept: dict[int, torch.Tensor] = {}

    def get(self, batch: Batch, compute: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
        """Return a batch's tensor, which is computed unless it is cached."""
        if batch.start in self._kept:
            return self._kept[batch.start]
        value = compute(batch)
        if value.nbytes <= self.budget:
            self.budget -= value.nbytes
            self._kept[batch.start] = value
        return value


class Calibration:
    """Calibration windows, divided into windows for fitting, tuning and evaluation.

    Args:
        windows: Token ids, shape (N, T).
        micro_batch_size: Windows per batch.
        device: Device for computation.
        n_closed_form: Number of leading windows for the closed form; all by default. The remaining windows only train
            all blocks jointly.
        held_out: Windows of the validation data to evaluate on, shape (N, T); by default, the last of the windows for
            the closed form.
        counts: True at positions whose predictions are trained and evaluated, shape of `windows`; by default all are.
            The closed form fits hidden states at all positions, since positions that count attend to others.
        held_out_counts: The same for `held_out`.

    Raises:
        UserError: If there are fewer than three windows for the closed form (each of the three parts needs one), or if
            no position counts among those for fitting and tuning, or among those for evaluation.
    """

    def __init__(
        self,
        windows: torch.Tensor,
        micro_batch_size: int = 16,
        device: torch.device | str = "cpu",
        n_closed_form: int | None = None,
        held_out: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        held_out_counts: torch.Tensor | None = None,
    ) -> None:
        n = len(windows) if n_closed_form is None else min(n_closed_form, len(windows))
        check_n_windows(n)
        n_tuning = max(n // 8, 1)
        self.device = device
        self.is_validated = held_out is not None
        """True if the held-out tokens come from the validation data"""
        self._counts = None
        if counts is not None or held_out_counts is not None:
            self._counts = torch.ones_like(windows, dtype=torch.bool) if counts is None else counts
        if held_out is None:
            n_last = max(n // HELD_OUT, 1)
            self.windows, self._first_held_out = windows, n - n_last
        else:
            n_last = len(held_out)
            self.windows, self._first_held_out = torch.cat([windows[:n], held_out, windows[n:]]), n
            if self._counts is not None:
                theirs = torch.ones_like(held_out, dtype=torch.bool) if held_out_counts is None else held_out_counts
                self._counts = torch.cat([self._counts[:n], theirs, self._counts[n:]])
        self._there: torch.Tensor | None = None
        """The windows on the device, copied there on first use"""
        self.n_first = n = self._first_held_out + n_last
        """Number of leading windows that teacher and student run on: for the closed form, and held-out windows"""
        self._first_tuning = self._first_held_out - n_tuning
        self.all_batches = [
            slice(start, min(start + micro_batch_size, end))
            for begin, end in (
                (0, self._first_tuning),
                (self._first_tuning, self._first_held_out),
                (self._first_held_out, n),
            )
            for start in range(begin, end, micro_batch_size)
        ]
        self._check_counts()
        self.batches = self.share(self.all_batches)
        self.further_batches = self.share(
            [
                slice(i, min(i + micro_batch_size, len(self.windows)))
                for i in range(n, len(self.windows), micro_batch_size)
            ]
        )

    def _check_counts(self) -> None:
        parts = {"fit": self.fitted_windows, "evaluate": self.held_out_windows}
        for name, windows in parts.items():
            if not len(self.counted(windows)):
                raise UserError(
                    f"the calibration text to {name} on must hold a token that counts, and its {len(windows)} windows "
                    "hold none; raise repair.tokens, or set data.answers_only to false"
                )

    def counted(self, windows: range) -> torch.Tensor:
        """Return the positions in these windows that count, as indices into all windows concatenated, shape (n,)."""
        length = self.windows.shape[1]
        positions = torch.arange(windows.start * length, windows.stop * length)
        if self._counts is None:
            return positions
        return positions[self._counts[windows.start : windows.stop].flatten()]

    def counts(self, windows: slice) -> torch.Tensor | None:
        """Return a mask of the positions that count in these windows, (B, T), on the device; None if all count."""
        return None if self._counts is None else self._counts[windows].to(self.device)

    @staticmethod
    def share(batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return this process's share of these batches."""
        return batches[rank() :: world_size()]

    def is_held_out(self, batch: Batch) -> bool:
        """Return whether the batch is held out."""
        return batch.start >= self._first_held_out

    def is_tuning(self, batch: Batch) -> bool:
        """Return whether the batch is used to select ridges."""
        return self._first_tuning <= batch.start < self._first_held_out

    @property
    def teacher_batches(self) -> list[Batch]:
        """This process's batches that the teacher runs on: all batches, including those for joint training."""
        return [*self.batches, *self.further_batches]

    @property
    def training_batches(self) -> list[Batch]:
        """This process's batches to fit or train on: all except held-out batches."""
        return [*self.fitted_batches, *self.further_batches]

    @property
    def training_windows(self) -> torch.Tensor:
        """Indices of the windows to train on, which are all except held-out windows, shape (n,)."""
        indices = torch.arange(len(self.windows))
        return indices[(indices < self._first_held_out) | (indices >= self.n_first)]

    @property
    def held_out_windows(self) -> range:
        """Indices of the held-out windows."""
        return range(self._first_held_out, self.n_first)

    @property
    def fitted_windows(self) -> range:
        """Indices of the windows for the closed form, including those reserved for tuning."""
        return range(self._first_held_out)

    @property
    def compared_windows(self) -> range:
        """Indices of as many fitted windows as there are held-out windows, to compare the errors on both."""
        return range(min(len(self.held_out_windows), self._first_held_out))

    @property
    def fitted_batches(self) -> list[Batch]:
        """This process's batches for fitting, including the batches reserved for tuning."""
        return [batch for batch in self.batches if not self.is_held_out(batch)]

    @property
    def tuning_batches(self) -> list[Batch]:
        """This process's batches for selecting ridges."""
        return [batch for batch in self.batches if self.is_tuning(batch)]

    @property
    def held_out_batches(self) -> list[Batch]:
        """This process's held-out batches."""
        return [batch for batch in self.batches if self.is_held_out(batch)]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of windows and tokens per window."""
        return self.windows.size(0), self.windows.size(1)

    @property
    def n_fitted(self) -> int:
        """Number of tokens for fitting the closed form, including tuning tokens."""
        return self._first_held_out * self.windows.shape[1]

    def ids(self, batch: Batch) -> torch.Tensor:
        """Return the batch's token ids on the device, shape (B, T)."""
        if self._there is None:
            self._there = to_device(self.windows, torch.device(self.device))
        return self._there[batch]

    def cache(self) -> BatchCache:
        """Return a cache of activations on the device, within 1/CACHE_PARTS of the free memory."""
        device = torch.device(self.device)
        return BatchCache(free_memory(device, n_sharing(device)) // CACHE_PARTS)

    def moments(
        self, n_in: int, n_out: int, examples: Callable[[Batch], tuple[torch.Tensor, ...]]
    ) -> tuple[Moments, Moments]:
        """Accumulate the moments of all batches for fitting, over all processes.

        Args:
            n_in: Size of the inputs.
            n_out: Size of the outputs.
            examples: Returns a batch's inputs, shape (…, n_in), outputs, shape (…, n_out), and optionally token
                weights, shape (…).

        Returns:
            Moments of the fitting tokens and of the tuning tokens.
        """
        # with many tokens per input, rounding errors of the products are far below the noise of the data
        fp32_products = self.n_fitted >= FLOAT32_TOKENS_PER_INPUT * n_in
        fitted, tuning = (Moments(n_in, n_out, self.device, fp32_products=fp32_products) for _ in range(2))
        for batch in self.fitted_batches:
            (tuning if self.is_tuning(batch) else fitted).add(*examples(batch))
        return fitted.over_processes(), tuning.over_processes()


def n_held_out(n: int, length: int) -> int:
    """Return the number of validation windows to hold out for n windows of calibration data.

    Args:
        n: Number of calibration windows.
        length: Tokens per window.
    """
    return max(n // HELD_OUT, min(LEAST_HELD_OUT // length, n // 4), 1)


def check_n_windows(n: int) -> None:
    """Check that there is at least one window each for fitting, tuning and evaluation.

    Raises:
        UserError: If there are fewer than three windows.
    """
    if n < 3:
        raise UserError(f"a repair needs at least 3 windows of calibration data, got {n}; raise repair.tokens")
