"""Validation batches of a run: the same batches at every pass, even if the data module shuffles."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from litgpt_whittle.data.loader_state import (
    generator_states,
    generators_of,
    set_generator_states,
)
from litgpt_whittle.training.data_stream import shared_batches
from litgpt_whittle.training.resume import (
    rng_state,
    set_rng_state,
)

KEPT_BYTES = 512 * 2**20
"""Maximum bytes of validation batches that a process keeps in memory; a larger set is read again at every pass"""

SEED = 0
"""Seed of the batches' order if the data module shuffles; the same in every command, so that all validate on the same
text"""


@contextmanager
def fixed_randomness(loader: Any = None) -> Iterator[None]:
    """Draw random numbers from a fixed seed inside the context, and restore the generators' states on exit.

    Args:
        loader: A dataloader; its random generators are set and restored, too.
    """
    before, own = rng_state(), generator_states(loader)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for generator in generators_of(loader):
        generator.manual_seed(SEED)
    try:
        yield
    finally:
        set_rng_state(before)
        set_generator_states(loader, own)


class ValidationBatches:
    """The first validation batches of a data module, divided among the processes; every pass has the same batches.

    They are read once and kept in memory, because a loader may change their order from epoch to epoch.

    Args:
        loader: A validation dataloader, not iterated over yet.
        make_loader: Returns a new dataloader, for batches that exceed `KEPT_BYTES`.
        n: Number of batches to take; fewer if the loader has fewer.
        rank: Rank of this process.
        world_size: Number of processes that share the batches.
    """

    def __init__(self, loader: Any, make_loader: Callable[[], Any], n: int, rank: int = 0, world_size: int = 1) -> None:
        self.make_loader, self.n, self.rank, self.world_size = make_loader, n, rank, world_size
        self._loader = loader
        self._kept: list[tuple[Any, bool]] | None = None
        self._is_read = False
        self._twin = _without_data(loader)
        """Draws the random numbers that `loader` would draw"""

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        """Iterate over this process's share of the batches, with flags as in `shared_batches`."""
        if not self._is_read:
            self._kept, self._is_read = self._read(), True
            self._loader = None  # also ends its worker processes
        if self._kept is not None:
            return iter(self._kept)
        with fixed_randomness():
            loader = self.make_loader()
        return self._stream(loader)

    def _read(self) -> list[tuple[Any, bool]] | None:
        kept, n_bytes = [], 0
        for batch, counts in self._stream(self._loader):
            kept.append((batch, counts))
            n_bytes += sum(tensor.nbytes for tensor in _tensors(batch))
            if n_bytes > KEPT_BYTES:
                return None
        return kept

    def _stream(self, loader: Any) -> Iterator[tuple[Any, bool]]:
        with fixed_randomness(loader):
            yield from shared_batches(loader, self.n, self.rank, self.world_size)

    def draw(self) -> None:
        """Draw as many random numbers as a pass over the dataloader, to match `litgpt pretrain`."""
        if self._twin is not None:
            next(iter(self._twin), None)

    def state_dict(self) -> list[torch.Tensor]:
        """Return the states of the dataloader's random generators."""
        return generator_states(self._twin)

    def load_state_dict(self, state: list[torch.Tensor]) -> None:
        """Restore the states of the dataloader's random generators."""
        set_generator_states(self._twin, state)


def _without_data(loader: Any) -> DataLoader | None:
    """Return a dataloader that draws the order of `loader` without reading data; None if that is impossible."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    return DataLoader(
        _Nothing(), batch_sampler=loader.batch_sampler, generator=loader.generator, collate_fn=lambda samples: samples
    )


class _Nothing(Dataset[None]):
    """A dataset without content that accepts any index."""

    def __getitem__(self, index: int) -> None:
        return None


def _tensors(batch: Any) -> Iterable[torch.Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else (batch,)
    return (value for value in values if isinstance(value, torch.Tensor))
