"""A teacher's predictions for a corpus, on disk: windows of tokens and the teacher's targets for each.

A cache is a folder of shards and an index. Windows are looked up by a hash of their tokens. A window therefore gets its
targets for any data order, batch size, epoch or number of devices. The folder also holds the teacher's config and
tokenizer, so that a student can be checked against them without the teacher itself. Nothing in the folder is ever
executed or unpickled: the index is JSON, the shards are plain arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from litgpt.config import Config

from litgpt_whittle.distillation.codecs import Codec, id_bytes, make_codec, pack_ids
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import write_text
from litgpt_whittle.model_config import MODEL_CONFIG, read_model_config

INDEX = "index.json"
VERSION = 1
KEY_BYTES = 16

EAGER_BYTES = 4 * 10**9
"""Maximum size of a cache that is checked completely when it is opened, which takes seconds, so that damage is found
before training begins. In larger caches, each shard is checked at its first use, because reading all takes minutes."""


@dataclass(frozen=True)
class Contents:
    """Settings that a cache was made with. They determine every byte of the shards."""

    teacher: str
    """The teacher's name"""
    weights: str
    """Fingerprint of the teacher's weights (`checkpoint.weights_fingerprint`)"""
    vocab_size: int
    """Size of the teacher's padded vocabulary"""
    codec: dict[str, dict[str, Any]]
    """The codec's name and settings"""
    temperature: float | None
    """Temperature of the teacher's probabilities; None if logits are stored"""
    seed: int
    """Seed of random draws and of the data order"""
    precision: str
    """Precision that the teacher ran in"""
    max_seq_length: int
    """Maximum number of tokens per window"""
    max_tokens: int | None
    """Number of tokens after which caching stops; None for all the data"""
    micro_batch_size: int
    """Windows per forward pass; recorded because it may affect rounding"""
    shard_bytes: int
    """Requested size of a shard in bytes"""
    data: dict[str, Any]
    """The data module and its settings, by name"""

    def make_codec(self) -> Codec:
        """Return the codec, loaded from its entry point."""
        return make_codec(self.codec, self.vocab_size, 1.0 if self.temperature is None else self.temperature)


@dataclass(frozen=True)
class Shard:
    """Entry of a finished shard in the index."""

    n_windows: int
    checksum: int
    """CRC-32 of the whole file"""


@dataclass(frozen=True)
class Index:
    """A cache's table of contents."""

    contents: Contents
    length: int | None = None
    """Tokens per window, T: at most `max_seq_length`; None before the first window"""
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    def write(self, folder: Path) -> None:
        """Write the index atomically."""
        content = {"version": VERSION, **asdict(self)}
        content["shards"] = [[shard.n_windows, shard.checksum] for shard in self.shards]
        write_text(Path(folder) / INDEX, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the index of a folder.

        Raises:
            UserError: If the index is missing, damaged or of another version.
        """
        path = Path(folder) / INDEX
        try:
            content = json.loads(path.read_bytes())
            if content.pop("version") != VERSION:
                raise UserError(f"{str(path)!r} is of another version of litgpt_whittle; cache the teacher again")
            shards = tuple(Shard(*map(_natural, shard)) for shard in content.pop("shards"))
            contents = Contents(**content.pop("contents"))
            length = content.pop("length")
            index = cls(contents, None if length is None else _natural(length), shards, content.pop("complete") is True)
            if not isinstance(contents.temperature, float | None) or not isinstance(contents.codec, dict):
                raise TypeError("temperature or codec")
            _natural(contents.vocab_size)
            _natural(contents.max_seq_length)
        except OSError:
            raise UserError(
                f"{str(folder)!r} is not a teacher's cache, it has no {INDEX}; make one with litgpt cache_teacher"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{str(path)!r} is damaged ({error!r}); cache the teacher again") from None
        return index


def _natural(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{number!r} is no natural number")
    return number


def shard_path(folder: Path, i: int) -> Path:
    """Return the path of shard i.

    It depends on the number alone, so that a manipulated `index.json` cannot refer to files outside of the folder.
    """
    return Path(folder) / f"shard-{i:05d}.bin"


def window_key(ids: np.ndarray) -> bytes:
    """Return a 16-byte hash of a window's token ids, shape (T,)."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<u4").tobytes()).digest()[:KEY_BYTES]


class Layout:
    """File layout of a shard of n windows: all keys, then the tokens and targets of each window.

    Args:
        codec: The codec.
        length: Tokens per window, T.

    Raises:
        UserError: If a window is too large to be one array.
    """

    def __init__(self, codec: Codec, length: int) -> None:
        self.codec = codec
        tokens = ("tokens", "u1", (length, id_bytes(codec.vocab_size)))
        try:
            self.record = np.dtype([tokens, ("targets", codec.dtype, (length, *codec.shape))])
        except ValueError:
            raise UserError(
                f"a window must take less than 2 GB, got {length} tokens of {codec.n_bytes:,} bytes; choose another "
                "codec"
            ) from None
        self.window_bytes = KEY_BYTES + self.record.itemsize

    def keys(self, path: Path, n: int) -> np.ndarray:
        """Read the keys of a shard's n windows, bytes, shape (n, 16)."""
        return np.fromfile(path, "u1", n * KEY_BYTES).reshape(-1, KEY_BYTES)

    def map(self, path: Path, n: int) -> np.ndarray:
        """Memory-map a shard's n windows: fields `tokens` (n, T, bytes of an id), `targets` (n, T, *codec.shape)."""
        return np.memmap(path, self.record, "r", offset=n * KEY_BYTES, shape=(n,))

    def records(self, ids: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
        """Return the records of windows (n, T) and their targets (n, T, *codec.shape), shape (n,)."""
        records = np.empty(len(ids), self.record)
        records["tokens"] = pack_ids(ids, self.codec.vocab_size).numpy()
        records["targets"] = targets.cpu().numpy()
        return records


def write_shard(path: Path, keys: Sequence[bytes], batches: Iterable[np.ndarray]) -> Shard:
    """Write a shard to a temporary file and rename it to `path`.

    Args:
        path: Path of the shard.
        keys: Keys of its windows.
        batches: Its windows in the same order, as returned by `Layout.records`.

    Raises:
        UserError: If the file cannot be written, such as on a full disk.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            checksum = _write(file, b"".join(keys), 0)
            for records in batches:
                checksum = _write(file, records.tobytes(), checksum)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(
            f"{str(path)!r} cannot be written ({error.strerror}); free some space and continue with --resume true"
        ) from None
    os.replace(beside, path)
    return Shard(len(keys), checksum)


def _write(file: BinaryIO, content: bytes, checksum: int) -> int:
    file.write(content)
    return zlib.crc32(content, checksum)


def checksum_of(path: Path) -> int:
    """Return the CRC-32 of a file, which detects damage and is as fast as reading the disk."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def remove_unfinished(folder: Path) -> None:
    """Remove partially written shards of killed processes."""
    for path in Path(folder).glob(".shard-*"):
        path.unlink()


class Cache:
    """A teacher's cache, open for reading.

    Args:
        folder: A folder written by `litgpt cache_teacher`.

    Raises:
        UserError: If the folder is not a cache, or the cache is unfinished or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = Path(folder), Index.read(folder)
        self.contents = self.index.contents
        if not self.index.complete or not self.index.length:
            raise UserError(
                f"the cache {str(folder)!r} is not finished; continue it with litgpt cache_teacher --resume true"
            )
        self.codec = self.contents.make_codec()
        self.layout = Layout(self.codec, self.index.length)
        self._windows: dict[int, np.ndarray] = {}
        keys = []
        for i, shard in enumerate(self.index.shards):
            self._check_size(i, shard)
            keys.append(self.layout.keys(shard_path(folder, i), shard.n_windows))
        sizes = [shard.n_windows for shard in self.index.shards]
        self._starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        self._table = _Table(np.concatenate(keys) if keys else np.empty((0, KEY_BYTES), "u1"))
        if self._starts[-1] * self.layout.window_bytes <= EAGER_BYTES:
            for i in range(len(sizes)):
                self._open(i)

    @property
    def n_windows(self) -> int:
        """Number of distinct windows."""
        return int(self._starts[-1])

    @property
    def teacher_config(self) -> Config:
        """The teacher's config.

        Raises:
            UserError: If the config is missing or damaged, or if its vocabulary does not match the targets.
        """
        config = read_model_config(self.folder / MODEL_CONFIG)
        if config.padded_vocab_size != self.contents.vocab_size:
            raise UserError(
                f"the model_config.yaml of the cache {str(self.folder)!r} has a padded_vocab_size of "
                f"{config.padded_vocab_size}, its targets have {self.contents.vocab_size}; copy it from the teacher"
            )
        return config

    def targets(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look up the encoded targets of windows.

        Args:
            input_ids: Token ids, shape (B, T), on the CPU.

        Returns:
            A copy of the encoded targets, shape (B · T, *codec.shape).

        Raises:
            UserError: If a window is missing or has another length, or its shard is damaged.
        """
        if input_ids.size(1) != self.index.length:
            raise UserError(
                f"the windows of the cache {str(self.folder)!r} have {self.index.length} tokens, got one of "
                f"{input_ids.size(1)}; use the data and the train.max_seq_length that it was made with"
            )
        tokens = pack_ids(input_ids, self.contents.vocab_size).numpy()
        out = np.empty((len(input_ids), *self.layout.record["targets"].shape), self.codec.dtype)
        for i, ids in enumerate(input_ids.numpy()):
            row = self._table.find(window_key(ids))
            if row is None:
                raise UserError(
                    f"the cache {str(self.folder)!r} lacks a window that begins with the tokens {ids[:8].tolist()}: it "
                    "was made with other data, another train.max_seq_length, another tokenizer or fewer max_tokens; "
                    "use those of the cache, or cache the teacher again"
                )
            shard = int(np.searchsorted(self._starts, row, side="right")) - 1
            record = self._open(shard)[row - self._starts[shard]]
            if not np.array_equal(record["tokens"], tokens[i]):
                raise self._damaged(shard, "the tokens of a window are not those of its key")
            out[i] = record["targets"]
        return torch.from_numpy(out.reshape(-1, *self.codec.shape))

    def _open(self, i: int) -> np.ndarray:
        """Return a shard's windows, memory-mapped; its checksum is verified the first time."""
        if i not in self._windows:
            path, shard = shard_path(self.folder, i), self.index.shards[i]
            if checksum_of(path) != shard.checksum:
                raise self._damaged(i, "its checksum is not that of the index")
            self._windows[i] = self.layout.map(path, shard.n_windows)
        return self._windows[i]

    def _check_size(self, i: int, shard: Shard) -> None:
        path, expected = shard_path(self.folder, i), shard.n_windows * self.layout.window_bytes
        if not path.is_file():
            raise self._damaged(i, "the file is missing")
        if path.stat().st_size != expected:
            raise self._damaged(i, f"it has {path.stat().st_size:,} bytes instead of {expected:,}")

    def _damaged(self, i: int, what: str) -> UserError:
        return UserError(
            f"{str(shard_path(self.folder, i))!r} is damaged: {what}; remove it, and repeat the same litgpt "
            "cache_teacher command with --resume true"
        )


class _Table:
    """Map from keys to row numbers that takes 24 bytes per row; a dictionary would take several times as much.

    Args:
        keys: Distinct keys, bytes, shape (n, 16).
    """

    def __init__(self, keys: np.ndarray) -> None:
        halves = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)  # (n, 2)
        self._rows = np.lexsort((halves[:, 1], halves[:, 0]))
        self._high, self._low = halves[self._rows, 0], halves[self._rows, 1]

    def find(self, key: bytes) -> int | None:
        """Return the row of a key, or None if it is missing."""
        high, low = np.frombuffer(key, ">u8").astype(np.uint64)
        start = np.searchsorted(self._high, high, side="left")
        stop = np.searchsorted(self._high, high, side="right")
        place = start + np.searchsorted(self._low[start:stop], low)
        return int(self._rows[place]) if place < stop and self._low[place] == low else None
