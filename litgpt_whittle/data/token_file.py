"""Token files: written atomically, and read as memory-mapped windows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import new_folder, write_text

TOKENS, ABOUT = "tokens.bin", "about.json"


def write_tokens(folder: Path, documents: Iterable[list[int]], eos_id: int, vocab_size: int, about: dict) -> None:
    """Write documents in sequence, each followed by EOS; `folder` appears once all are written.

    If several processes write the same folder, the folder that is finished first is kept.

    Raises:
        UserError: If the folder cannot be written, for instance because the disk is full.
    """
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    n_documents, n_tokens, largest = 0, 0, eos_id
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, replaces=False) as inside:
            with open(inside / TOKENS, "wb") as file:
                for ids in documents:
                    file.write(np.asarray([*ids, eos_id], dtype=dtype).tobytes())
                    n_documents, n_tokens = n_documents + 1, n_tokens + len(ids) + 1
                    largest = max(largest, *ids)
            counts = {"n_documents": n_documents, "n_tokens": n_tokens, "largest_id": largest}
            write_text(inside / ABOUT, json.dumps(about | {"dtype": np.dtype(dtype).name} | counts, indent=2))
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

    def __init__(self, folder: Path, length: int, bos_id: int | None = None) -> None:
        self.folder, self.length, self.bos_id = Path(folder), length, bos_id
        self.about = json.loads((self.folder / ABOUT).read_text())
        self._tokens: np.ndarray | None = None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokens."""
        return self.about["fingerprint"]

    def __len__(self) -> int:
        n_tokens = self.about["n_tokens"] - (self.bos_id is None)
        return max(0, n_tokens // (self.length - 1))

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        if self._tokens is None:
            self._tokens = np.memmap(self.folder / TOKENS, dtype=self.about["dtype"], mode="r")
        start = index * (self.length - 1)
        if self.bos_id is None:
            return torch.from_numpy(self._tokens[start : start + self.length].astype(np.int64))
        return torch.from_numpy(np.append(self.bos_id, self._tokens[start : start + self.length - 1]).astype(np.int64))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_tokens": None}  # litgpt pickles dataloaders; the file is mapped again


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
