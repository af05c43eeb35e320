"""Training batches over any number of epochs, divided among the processes and resumable at any batch.

The batches and their order do not depend on the number of processes. With n processes, process i takes every n-th
batch from batch i on, so that an optimizer step sees the same samples for any n.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from litgpt_whittle.data.loader_state import (
    generator_states,
    set_epoch,
    set_generator_states,
)
from litgpt_whittle.errors import UserError
from litgpt_whittle.training.resume import (
    rng_state,
    set_rng_state,
)


class DataStream:
    """Cycles through a dataloader and can resume at any batch of any epoch.

    Dataloaders draw their order from random generators when an epoch starts. The state dict holds the generators'
    state at that moment. Resuming restores that state and skips the batches already trained on, with any data module.

    Args:
        loader: A dataloader with at least one batch. If it can skip batches (`skipping`), the batches of other
            processes are never read.
        rank: Rank of this process.
        world_size: Number of processes that share the batches.
    """

    def __init__(self, loader: Iterable, rank: int = 0, world_size: int = 1) -> None:
        self.loader, self.rank, self.world_size = loader, rank, world_size
        self.epoch = 0
        sampler = getattr(loader, "batch_sampler", None)
        self._skip = sampler if isinstance(sampler, SkippingBatches) else None
        self._batch = 0  # next batch of this epoch, counted over all processes
        self._start: dict[str, Any] = {}
        self._iterator: Iterator | None = None

    def __iter__(self) -> DataStream:
        return self

    def __next__(self) -> Any:
        own = None
        for turn in range(self.world_size):
            batch = self._advance(turn)
            own = batch if turn == self.rank else own
        return own

    def _advance(self, turn: int) -> Any:
        """Advance by one batch; load it only if this rank owns it or batches cannot be skipped."""
        iterator = self._iterator
        if iterator is None:
            iterator = self._begin(turn)
        elif self._skip is not None and self._batch == len(self._skip.batch_sampler):
            iterator = self._begin_next(turn)
        if self._skip is not None and turn != self.rank:
            self._batch += 1
            return None
        try:
            batch = next(iterator)
        except StopIteration:
            batch = next(self._begin_next(turn), None)
            if batch is None:
                raise UserError("the training data must fill at least one batch, got none; add data") from None
        self._batch += 1
        return batch

    def _begin_next(self, turn: int) -> Iterator:
        """Start the next epoch, whose first batch process `turn` takes, and return its iterator."""
        self.epoch += 1
        return self._begin(turn)

    def _begin(self, turn: int, batch: int = 0) -> Iterator:
        """Start the current epoch at `batch`, which process `turn` takes, and return its iterator."""
        self._start = {"rng": rng_state(), "generators": generator_states(self.loader)}
        set_epoch(self.loader, self.epoch)
        if self._skip is not None:
            self._skip.first, self._skip.step = batch + (self.rank - turn) % self.world_size, self.world_size
        self._iterator = iterator = iter(self.loader)
        if self._skip is not None:
            self._skip.draw()
        self._batch = batch
        return iterator

    @property
    def position(self) -> str:
        """Position as text: the epoch, counted from 1, and the number of its batches that have been read."""
        return f"epoch {self.epoch + 1}, batch {self._batch}"

    def state_dict(self) -> dict[str, Any]:
        """Return the position, equal for any number of processes, loadable by `torch.load(weights_only=True)`."""
        return {"epoch": self.epoch, "batch": self._batch, "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position. The caller must restore the global random generators afterwards.

        Raises:
            UserError: If the epoch has fewer batches than the position.
        """
        if not state["start"]:
            return
        self.epoch = state["epoch"]
        set_rng_state(state["start"]["rng"])
        set_generator_states(self.loader, state["start"]["generators"])
        if self._skip is not None:
            self._begin(0, state["batch"])
            return
        iterator = self._begin(0)
        for _ in range(state["batch"]):
            if next(iterator, None) is None:
                raise UserError("the training data has fewer samples than before; resume with the same data")
        self._batch = state["batch"]


class SkippingBatches(Sampler[list[int]]):
    """Sampler of every `step`-th batch of another batch sampler, from batch `first` on.

    Samples of skipped batches are not read.

    Args:
        batch_sampler: The batch sampler to wrap.
    """

    _all: Iterator[list[int]]
    _drawn: list[list[int]]

    def __init__(self, batch_sampler: BatchSampler) -> None:
        self.batch_sampler = batch_sampler
        self.sampler = batch_sampler.sampler
        self.first, self.step = 0, 1

    def __iter__(self) -> Iterator[list[int]]:
        self._all, self._drawn = iter(self.batch_sampler), []
        return self._own()

    def _own(self) -> Iterator[list[int]]:
        self.draw()
        yield from islice(chain(self._drawn, self._all), self.first, None, self.step)

    def draw(self) -> None:
        """Take the first batch of the wrapped sampler, unless taken already, so that it draws the epoch's order now.

        Otherwise, each process would draw it at its first batch, after different numbers of other random draws.
        """
        if not self._drawn:
            self._drawn = list(islice(self._all, 1))

    def __len__(self) -> int:
        return len(range(self.first, len(self.batch_sampler), self.step))


def skipping(loader: Any) -> Any:
    """Return an equivalent dataloader that lets a `DataStream` skip batches unread; `loader` itself if impossible."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return loader
    if not (hasattr(loader.batch_sampler, "sampler") and hasattr(loader.batch_sampler, "__len__")):
        return loader  # a custom batch sampler need only be iterable
    names = ["num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"]
    names += ["generator", "prefetch_factor", "persistent_workers", "pin_memory_device"]
    same = {name: getattr(loader, name) for name in names}
    batches = SkippingBatches(cast(BatchSampler, loader.batch_sampler))
    return DataLoader(loader.dataset, batch_sampler=batches, **same)


def shared_batches(loader: Iterable, most: int, rank: int, world_size: int) -> Iterator[tuple[Any, bool]]:
    """Yield this process's share of the first `most` batches, each with a flag that is true if the batch counts.

    All processes get equally many batches, because sharded models run on all processes at once. If the last batches are
    fewer than the processes, some processes get a copy of another's batch, flagged as not counting.
    """
    turn: list[Any] = []
    for i, batch in enumerate(loader):
        if i >= most:
            break
        turn.append(batch)
        if len(turn) == world_size:
            yield turn[rank], True
            turn = []
    if turn:
        yield turn[min(rank, len(turn) - 1)], rank < len(turn)
