"""Token files: written atomically, and read as memory-mapped windows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import new_folder, write_text
from litgpt_whittle.tensors import IGNORE_INDEX

TOKENS, ABOUT = "tokens.bin", "about.json"

COUNTS = "counts.bin"
"""File beside the tokens with a byte per token: 1 if the token counts in the loss, else 0; missing if all do"""


class Document(NamedTuple):
    """Tokens of a document."""

    ids: list[int]
    counts: list[bool] | None = None
    """True for each token that counts in the loss; None if all do"""

    def cut(self, n: int) -> Document:
        """Return the first n tokens."""
        return Document(self.ids[:n], None if self.counts is None else self.counts[:n])


def write_tokens(
    folder: Path, documents: Iterable[Document], eos_id: int | None, vocab_size: int, about: dict, masked: bool = False
) -> None:
    """Write documents in sequence; `folder` appears once all are written.

    If several processes write the same folder, the folder that is finished first is kept.

    Args:
        folder: The folder to write.
        documents: The documents.
        eos_id: Token to write after each document, if any.
        vocab_size: Number of token ids.
        about: Facts to store beside the tokens.
        masked: If true, store which tokens count, which the documents must give.

    Raises:
        UserError: If the folder cannot be written, for instance because the disk is full.
    """
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    end = [] if eos_id is None else [eos_id]
    n_documents, n_tokens, largest = 0, 0, max(end, default=0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, replaces=False) as inside:
            with open(inside / TOKENS, "wb") as file, open(inside / COUNTS, "wb") if masked else nullcontext() as mask:
                for ids, counts in documents:
                    file.write(np.asarray(ids + end, dtype=dtype).tobytes())
                    if mask is not None:
                        mask.write(bytes(counts or ()) + bytes(len(end)))
                    n_documents, n_tokens = n_documents + 1, n_tokens + len(ids) + len(end)
                    largest = max([largest, *ids])
            sizes = {"n_documents": n_documents, "n_tokens": n_tokens, "largest_id": largest}
            write_text(inside / ABOUT, json.dumps(about | {"dtype": np.dtype(dtype).name} | sizes, indent=2))
    except OSError as error:
        raise UserError(
            f"tokens cannot be written to {str(folder.parent)!r} ({error.strerror or error}); make room, or choose "
            "another folder as data.cache_dir"
        ) from None


def is_written(folder: Path) -> bool:
    """Return whether `write_tokens` has finished this folder."""
    return (folder / ABOUT).is_file()


class Windows(Dataset):
    """Windows of a token file. Consecutive windows share a token, so each token but the first is predicted once.

    Window i holds tokens i·T to i·T + T, inclusive. With BOS, it holds BOS and tokens i·T to i·T + T - 1, so each token
    is predicted once.

    Args:
        folder: A folder that `write_tokens` wrote.
        length: Tokens per window, T + 1.
        bos_id: BOS token to begin every window with, if any.
    """

    with_labels = False
    """If true, a window is a dict of `input_ids` and `labels`, which are -100 for tokens that do not count"""

    def __init__(self, folder: Path, length: int, bos_id: int | None = None) -> None:
        self.folder, self.length, self.bos_id = Path(folder), length, bos_id
        self.about = json.loads((self.folder / ABOUT).read_text())
        self.is_masked = (self.folder / COUNTS).is_file()
        """True if some tokens do not count in the loss"""
        self._tokens: np.ndarray | None = None
        self._counts: np.ndarray | None = None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokens."""
        return self.about["fingerprint"]

    def __len__(self) -> int:
        n_tokens = self.about["n_tokens"] - (self.bos_id is None)
        return max(0, n_tokens // (self.length - 1))

    def __getitem__(self, index: int) -> torch.Tensor | dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        if self._tokens is None:
            self._tokens = np.memmap(self.folder / TOKENS, dtype=self.about["dtype"], mode="r")
        ids = self._window(self._tokens, index, self.bos_id)
        if not self.with_labels:
            return ids
        if not self.is_masked:
            return {"input_ids": ids, "labels": ids}
        if self._counts is None:
            self._counts = np.memmap(self.folder / COUNTS, dtype=np.uint8, mode="r")
        counts = self._window(self._counts, index, None if self.bos_id is None else 0)
        return {"input_ids": ids, "labels": ids.where(counts > 0, IGNORE_INDEX)}

    def _window(self, values: np.ndarray, index: int, first: int | None) -> torch.Tensor:
        """Return a window of values of all tokens, shape (T + 1,), beginning with `first` unless it is None."""
        start, n = index * (self.length - 1), self.length - (first is not None)
        window = values[start : start + n].astype(np.int64)
        return torch.from_numpy(window if first is None else np.append(first, window))

    def __getstate__(self) -> dict:
        # litgpt pickles dataloaders; the files are mapped again
        return self.__dict__ | {"_tokens": None, "_counts": None}


class Shuffled(Sampler):
    """Sampler of a random order that depends only on seed and epoch.

    Each new pass is the next epoch, unless `set_epoch` sets it.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n)
        self.epoch += 1
        return iter(order.tolist())


def default_cache(local: Path | None) -> Path:
    """Return a folder next to local text if its location is writable, else a folder in the user's cache.

    Args:
        local: The text's file or folder; None for text on the hub.
    """
    if local is not None and os.access(local.parent, os.W_OK):
        return local.parent / ".tokens"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "litgpt_whittle" / "tokens"
