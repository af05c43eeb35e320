"""Run a teacher once over all windows of the training data and write its predictions to a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from tqdm import tqdm

from litgpt_whittle.data.loader_state import set_epoch
from litgpt_whittle.data.loading import split_batch
from litgpt_whittle.distillation.cache import (
    Index,
    Layout,
    Shard,
    checksum_of,
    remove_unfinished,
    shard_path,
    window_key,
    write_shard,
)
from litgpt_whittle.distillation.codecs import Codec
from litgpt_whittle.distillation.head import CHUNK_ELEMENTS, SoftTargets
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_space
from litgpt_whittle.processes import barrier, gather, on_rank_zero, parallel_map, rank, world_size
from litgpt_whittle.tensors import sums_dtype

Item = TypeVar("Item")

RunTeacher = Callable[[torch.Tensor], SoftTargets]
"""Token ids (B, T) -> the teacher's soft targets"""


class Window(NamedTuple):
    """A sequence of tokens to run the teacher on."""

    key: bytes
    ids: np.ndarray
    """Token ids, int32, shape (T,)"""


class Pass(NamedTuple):
    """One pass over the training data."""

    batches: Iterable[Any]
    n_windows: int | None
    """Number of windows, including repeated ones; None if it is unknown before the data is read"""
    begins_alike: bool
    """True if training begins with the same windows as this pass"""


def whole_pass(loader: Any) -> Pass:
    """Return a pass over all windows that a training dataloader may yield in any epoch.

    A loader that shuffles and drops the last batch leaves out different windows in each epoch. The pass therefore reads
    its whole dataset: in the order of the first epoch if that depends only on a seed, else in the dataset's order.
    Iterable datasets, and loaders other than PyTorch's, are read unchanged.
    """
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return Pass(loader, None, True)
    set_epoch(loader, 0)
    is_fixed = callable(getattr(loader.sampler, "set_epoch", None))
    sampler: Any = loader.sampler if is_fixed else SequentialSampler(cast(Sized, loader.dataset))
    whole = DataLoader(
        loader.dataset, loader.batch_size, sampler=sampler, num_workers=loader.num_workers, collate_fn=loader.collate_fn
    )
    return Pass(whole, len(sampler), is_fixed or isinstance(loader.sampler, SequentialSampler))


def unique_windows(batches: Iterable[Any], seq_length: int, max_tokens: int | None = None) -> Iterator[Window]:
    """Yield the distinct windows of training batches, in order of first appearance.

    Args:
        batches: Batches of a data module's dataloader.
        seq_length: Maximum number of tokens per sample.
        max_tokens: Stop after the window that reaches this number of tokens, including repeated windows.

    Raises:
        UserError: If windows differ in length.
    """
    seen: set[bytes] = set()
    length, n_tokens = None, 0
    for batch in batches:
        for ids in split_batch(batch, seq_length)[0].numpy().astype(np.int32):
            if max_tokens is not None and n_tokens >= max_tokens:
                return
            length = length or len(ids)
            if len(ids) != length:
                raise UserError(
                    f"all windows must be equally long to be cached, got {length} and {len(ids)} tokens; use data that "
                    "is packed into blocks"
                )
            n_tokens += length
            key = window_key(ids)
            if key not in seen:
                seen.add(key)
                yield Window(key, ids)


def write_cache(
    folder: Path,
    index: Index,
    teacher: RunTeacher,
    data: Pass,
    device: torch.device,
    progress: bool = False,
    in_step: bool = False,
    begin: Callable[[], None] = lambda: None,
) -> Index:
    """Fill a cache; each process writes different shards, and existing shards are kept.

    The data alone determines the windows of each shard and their batches. The files are therefore identical for any
    number of processes, even after an interruption.

    Args:
        folder: The cache's folder, with its index.
        index: The folder's index; checksums of the finished shards in it are not computed again.
        teacher: Function that runs the teacher on token ids.
        data: One pass over the training data.
        device: The teacher's device.
        progress: If true, show a progress bar with the remaining time.
        in_step: If true, all processes must run the teacher at the same time, each on its own windows.
        begin: Called by the first process after the checks of data and disk, before the first shard.

    Returns:
        The complete index.

    Raises:
        UserError: If there is no data, if finished shards were made from other data, or if the disk is too small.
    """
    contents = index.contents
    windows = unique_windows(data.batches, contents.max_seq_length, contents.max_tokens)
    starting = list(islice(windows, 2))  # two, to detect different lengths before anything is written
    if not starting:
        raise UserError("the training data is empty, so there is nothing to cache; give more data")
    length = len(starting[0].ids)
    layout = Layout(contents.make_codec(), length)
    n_windows = _n_windows(data, length, contents.max_tokens)
    on_rank_zero(lambda: _prepare(folder, layout, n_windows, index))
    if rank() == 0:
        begin()
    barrier()
    shards, index = list(index.shards), replace(index, length=length)
    chunks = enumerate(_batched(chain(starting, windows), windows_per_shard(layout, contents)))
    n_chunks = 0
    bar = tqdm(desc="Caching", unit=" tokens", unit_scale=True, disable=not progress)
    bar.total = None if n_windows is None else n_windows * length
    with bar:
        while group := list(islice(chunks, world_size())):
            fill = _Filler(folder, layout, teacher, device, index, lambda n: bar.update(n * len(group)))
            if bar.total is not None and shard_path(folder, group[0][0]).is_file():
                bar.total -= length * sum(len(chunk) for _, chunk in group)  # written by an earlier run
            for (i, _), shard in zip(group, _fill_in_step(fill, group) if in_step else list(parallel_map(fill, group))):
                shards[i : i + 1] = [shard]
            n_chunks += len(group)
            index = replace(index, shards=tuple(shards))
            if rank() == 0:
                index.write(folder)
    if n_chunks != len(shards):
        raise UserError(
            f"the training data fills {n_chunks} shards, the cache {str(folder)!r} has {len(shards)}: the data "
            "changed; choose another out_dir"
        )
    index = replace(index, complete=True)
    if rank() == 0:
        index.write(folder)
    barrier()
    return index


def _fill_in_step(fill: _Filler, group: list[tuple[int, tuple[Window, ...]]]) -> list[Shard]:
    """Write one shard on each process, with the same number of teacher calls on all, as a sharded teacher requires.

    Processes with fewer batches run the teacher on dummy input.
    """
    own = group[rank()] if rank() < len(group) else None
    n_own = 0 if own is None else fill.n_batches(own)
    n_most = max(gather(n_own))
    shard = None if own is None else fill(own)
    for _ in range(n_most - n_own):
        fill.teacher(torch.zeros(1, 1, dtype=torch.long, device=fill.device))
    return cast(list[Shard], gather(shard)[: len(group)])


def windows_per_shard(layout: Layout, contents: Any) -> int:
    """Return the number of windows per shard, a multiple of the batch size, so that no batch spans two shards."""
    batch_bytes = layout.window_bytes * contents.micro_batch_size
    return max(1, contents.shard_bytes // batch_bytes) * contents.micro_batch_size


def _n_windows(data: Pass, length: int, max_tokens: int | None) -> int | None:
    """Return the maximum number of windows to cache; None if it is unknown."""
    limits = [data.n_windows, None if max_tokens is None else -(-max_tokens // length)]
    return min((limit for limit in limits if limit is not None), default=None)


def _prepare(folder: Path, layout: Layout, n_windows: int | None, index: Index) -> None:
    """Remove unfinished shards, and check that the disk has space for the remaining windows, if they can be counted."""
    remove_unfinished(folder)
    if n_windows is not None:
        missing = n_windows - sum(shard.n_windows for shard in index.shards)
        check_space(folder, missing * layout.window_bytes, "the rest of the cache" if index.shards else "the cache")


def _batched(items: Iterable[Item], n: int) -> Iterator[tuple[Item, ...]]:
    """Yield tuples of n items; the last may be shorter."""
    items = iter(items)
    while batch := tuple(islice(items, n)):
        yield batch


class _Filler:
    """Writes one shard, or verifies an existing one.

    Args:
        folder: The cache's folder.
        layout: The layout of the shards.
        teacher: The teacher.
        device: The teacher's device.
        index: The current index, with the checksums of finished shards.
        tell: Called after each batch of the teacher with the number of tokens, to report progress.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        teacher: RunTeacher,
        device: torch.device,
        index: Index,
        tell: Callable[[int], Any],
    ) -> None:
        self.folder, self.layout, self.teacher, self.device, self.tell = folder, layout, teacher, device, tell
        self.contents, self.known = index.contents, index.shards

    def __call__(self, chunk: tuple[int, tuple[Window, ...]]) -> Shard:
        i, windows = chunk
        path, keys = shard_path(self.folder, i), [window.key for window in windows]
        if not path.is_file():
            batches = map(self._records, _batched(windows, self.contents.micro_batch_size))
            return write_shard(path, keys, batches)
        is_whole = path.stat().st_size == len(keys) * self.layout.window_bytes
        if not is_whole or self.layout.keys(path, len(keys)).tobytes() != b"".join(keys):
            raise UserError(
                f"{str(path)!r} differs from the training data: the data changed, or the file is damaged; choose "
                "another out_dir, or remove the file to have it written again"
            )
        return self.known[i] if i < len(self.known) else Shard(len(keys), checksum_of(path))

    def n_batches(self, chunk: tuple[int, tuple[Window, ...]]) -> int:
        """Return the number of teacher batches that a shard still needs."""
        i, windows = chunk
        return 0 if shard_path(self.folder, i).is_file() else -(-len(windows) // self.contents.micro_batch_size)

    def _records(self, windows: tuple[Window, ...]) -> np.ndarray:
        ids = torch.from_numpy(np.stack([window.ids for window in windows])).long()  # (B, T)
        codec, device = self.layout.codec, self.device
        uniform = [uniform_numbers(self.contents.seed, window, codec) for window in windows]
        targets = encode(codec, self.teacher(ids.to(device)), torch.from_numpy(np.concatenate(uniform)), device)
        self.tell(ids.numel())
        return self.layout.records(ids, targets.view(*ids.shape, *codec.shape))


def uniform_numbers(seed: int, window: Window, codec: Codec) -> np.ndarray:
    """Return random numbers in [0, 1), shape (T, codec.n_uniform), that depend only on the seed and the window."""
    rng = np.random.default_rng([seed, *np.frombuffer(window.key, "<u4").tolist()])
    return rng.random((len(window.ids), codec.n_uniform))


@torch.no_grad()
def encode(codec: Codec, targets: SoftTargets, uniform: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Encode a batch's targets in chunks of tokens, so that its full logits are never in memory.

    Args:
        codec: The codec.
        targets: The teacher's soft targets for the batch.
        uniform: Random numbers in [0, 1), shape (B · T, n_uniform).
        device: The teacher's device.

    Returns:
        The encoded targets, on the CPU, shape (B · T, *codec.shape).

    Raises:
        UserError: If the teacher's logits are NaN or +inf, or all -inf for a token.
    """
    size = max(32, CHUNK_ELEMENTS.get(device.type, 2**24) // codec.vocab_size)
    parts = []
    for start in range(0, len(uniform), size):
        rows = slice(start, min(start + size, len(uniform)))
        logits = cast(torch.Tensor, targets.chunk(rows.start, rows.stop))
        # -inf stands for a probability of 0, which not all tokens of a row can have
        if not ((logits < torch.inf).all() and (logits.amax(-1) > -torch.inf).all()):
            raise UserError(
                "the teacher's logits must be finite, and are not in this precision; use --precision bf16-true or "
                "32-true"
            )
        # the codec `sampled` needs float64, which this device may lack
        logits = logits.cpu() if sums_dtype(device) != torch.float64 else logits
        parts.append(codec.encode(logits, uniform[rows].to(logits.device)).cpu())
    return torch.cat(parts)
