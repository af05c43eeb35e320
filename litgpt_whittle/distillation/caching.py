"""Runs a teacher over all windows of the training data, once, and writes what it says into a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from tqdm import tqdm

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
from litgpt_whittle.processes import barrier, first_does, gather, rank, spread, world_size
from litgpt_whittle.training.loop import split_batch
from litgpt_whittle.training.resume import set_epoch

Item = TypeVar("Item")

RunTeacher = Callable[[torch.Tensor], SoftTargets]
"""Token ids (B, T) -> what the teacher says"""


class Window(NamedTuple):
    """What a teacher sees at once."""

    key: bytes
    ids: np.ndarray
    """Token ids, int32, shape (T,)"""


class Pass(NamedTuple):
    """One reading of the training data."""

    batches: Iterable[Any]
    n_windows: int | None
    """How many there are, repeated ones counted; None where only reading tells"""
    begins_alike: bool
    """Whether a training begins with the same ones"""


def whole_pass(loader: Any) -> Pass:
    """All windows that a training dataloader may ever give.

    One that shuffles and drops the last batch leaves some out in each epoch, and others in the next. So its dataset is
    read anew, in the order of the first epoch where that depends on nothing but a seed, else in the dataset's own. A
    stream, or a loader that isn't PyTorch's own, is read as it comes.
    """
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return Pass(loader, None, True)
    set_epoch(loader, 0)
    is_fixed = callable(getattr(loader.sampler, "set_epoch", None))
    sampler = loader.sampler if is_fixed else SequentialSampler(loader.dataset)
    whole = DataLoader(
        loader.dataset, loader.batch_size, sampler=sampler, num_workers=loader.num_workers, collate_fn=loader.collate_fn
    )
    return Pass(whole, len(sampler), is_fixed or isinstance(loader.sampler, SequentialSampler))


def unique_windows(batches: Iterable[Any], seq_length: int, max_tokens: int | None = None) -> Iterator[Window]:
    """The different windows of training batches, in the order of their first appearance.

    Args:
        batches: What a data module's dataloader gives.
        seq_length: The most tokens that the teacher sees of a sample.
        max_tokens: Stops at the window that completes so many, repeated ones counted.

    Raises:
        UserError: If they differ in length.
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
) -> Index:
    """Fills a cache, all processes together: each writes shards of its own. What is there is kept.

    A shard's windows depend on the data alone, and so do the batches that the teacher sees them in. So the files are
    the same with any number of processes, interrupted or not.

    Args:
        folder: The cache's folder, with its index.
        index: That index: finished shards that it knows are not read again.
        teacher: The teacher.
        data: The training data.
        device: Where the teacher runs.
        progress: Whether to show a bar, with the time that is left.
        in_step: Whether the processes can run the teacher only all together, each on its own windows.

    Returns:
        The complete index.

    Raises:
        UserError: If there is no data, it isn't what finished shards were made from, or the disk is too small.
    """
    contents = index.contents
    windows = unique_windows(data.batches, contents.max_seq_length, contents.max_tokens)
    first = next(windows, None)
    if first is None:
        raise UserError("the training data is empty, so there is nothing to cache; give more data")
    length = len(first.ids)
    layout = Layout(contents.make_codec(), length)
    n_windows = _n_windows(data, length, contents.max_tokens)
    first_does(lambda: _prepare(folder, layout, n_windows, index))
    barrier()
    shards, index = list(index.shards), replace(index, length=length)
    chunks = enumerate(_batched(chain([first], windows), windows_per_shard(layout, contents)))
    n_chunks = 0
    bar = tqdm(desc="Caching", unit=" tokens", unit_scale=True, disable=not progress)
    bar.total = None if n_windows is None else n_windows * length
    with bar:
        while group := list(islice(chunks, world_size())):
            fill = _Filler(folder, layout, teacher, device, index, lambda n: bar.update(n * len(group)))
            if bar.total is not None and shard_path(folder, group[0][0]).is_file():
                bar.total -= length * sum(len(chunk) for _, chunk in group)  # done already, by an earlier run
            for (i, _), shard in zip(group, _fill_in_step(fill, group) if in_step else list(spread(fill, group))):
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
    """Has each process write one shard; those with less to do run the teacher for the others' sake."""
    own = group[rank()] if rank() < len(group) else None
    n_own = 0 if own is None else fill.n_batches(own)
    n_most = max(gather(n_own))
    shard = None if own is None else fill(own)
    for _ in range(n_most - n_own):
        fill.teacher(torch.zeros(1, 1, dtype=torch.long, device=fill.device))
    return gather(shard)[: len(group)]


def windows_per_shard(layout: Layout, contents: Any) -> int:
    """How many windows a shard holds: whole batches, so that the teacher sees no batch in two parts."""
    batch_bytes = layout.window_bytes * contents.micro_batch_size
    return max(1, contents.shard_bytes // batch_bytes) * contents.micro_batch_size


def _n_windows(data: Pass, length: int, max_tokens: int | None) -> int | None:
    limits = [data.n_windows, None if max_tokens is None else -(-max_tokens // length)]
    return min((limit for limit in limits if limit is not None), default=None)


def _prepare(folder: Path, layout: Layout, n_windows: int | None, index: Index) -> None:
    remove_unfinished(folder)
    if n_windows is not None:
        missing = n_windows - sum(shard.n_windows for shard in index.shards)
        check_space(folder, missing * layout.window_bytes, "the rest of the cache" if index.shards else "the cache")


def _batched(items: Iterable[Item], n: int) -> Iterator[tuple[Item, ...]]:
    """Tuples of n items, the last one of what is left."""
    items = iter(items)
    while batch := tuple(islice(items, n)):
        yield batch


class _Filler:
    """Writes one shard, or finds it written.

    Args:
        folder: The cache's.
        layout: How shards are laid out.
        teacher: The teacher.
        device: Where it runs.
        index: What is known so far.
        tell: Is told how many tokens the teacher has seen.
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
                f"{str(path)!r} is not what the training data gives: the data changed, or the file is damaged; choose "
                "another out_dir, or remove the file to have it written anew"
            )
        return self.known[i] if i < len(self.known) else Shard(len(keys), checksum_of(path))

    def n_batches(self, chunk: tuple[int, tuple[Window, ...]]) -> int:
        """How often the teacher will be run for a shard."""
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
    """Random numbers in [0, 1) that depend on nothing but the seed and the window, shape (T, codec.n_uniform)."""
    rng = np.random.default_rng([seed, *np.frombuffer(window.key, "<u4").tolist()])
    return rng.random((len(window.ids), codec.n_uniform))


@torch.no_grad()
def encode(codec: Codec, said: SoftTargets, uniform: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What is stored of a batch, on the CPU, shape (B · T, *codec.shape); logits exist chunk by chunk only.

    Args:
        codec: The codec.
        said: What the teacher says about the batch.
        uniform: Random numbers, shape (B · T, n_uniform).
        device: Where the teacher runs.

    Raises:
        UserError: If the teacher's logits are no numbers.
    """
    size = max(32, CHUNK_ELEMENTS.get(device.type, 2**24) // codec.vocab_size)
    parts = []
    for start in range(0, len(uniform), size):
        rows = slice(start, min(start + size, len(uniform)))
        logits = said.chunk(rows.start, rows.stop)
        # -inf is a token without probability, of which a row must not have nothing else
        if not ((logits < torch.inf).all() and (logits.amax(-1) > -torch.inf).all()):
            raise UserError("the teacher's logits are not finite in this precision; use bf16-true or 32-true")
        parts.append(codec.encode(logits, uniform[rows].to(device)).cpu())
    return torch.cat(parts)
