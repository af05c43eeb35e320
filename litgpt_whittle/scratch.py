"""Where a walk through a model's layers keeps what memory cannot hold, and finds it after an interruption."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt_whittle.processes import barrier, rank
from litgpt_whittle.registry import version


class Stream:
    """Hidden states of all tokens, in a file: indexed by windows, float32, shape (N, T, n_embd)."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        # several processes may open it at once, so none may empty it
        with open(path, "ab") as file:
            file.truncate(4 * math.prod(shape))
        self._states = np.memmap(path, np.float32, "r+", shape=shape)

    def __getitem__(self, windows: slice) -> torch.Tensor:
        return torch.from_numpy(np.array(self._states[windows]))

    def __setitem__(self, windows: slice, states: torch.Tensor) -> None:
        self._states[windows] = states.cpu().numpy()

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """The states of tokens by their places, all windows one after the other: shape (n, n_embd)."""
        return torch.from_numpy(self._states.reshape(-1, self._states.shape[-1])[rows.numpy()])

    def flush(self) -> None:
        self._states.flush()


class Scratch:
    """A folder for streams and finished layers.

    Args:
        folder: Made when it is not there.
        key: What the work depends on. What a folder holds of other work is thrown away.

    Several processes may share a folder; the first one makes, saves and removes.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = Path(folder)
        is_other = not (self.folder / "key").is_file() or (self.folder / "key").read_text() != key
        barrier()
        if is_other and rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            (self.folder / "key").write_text(key)
        barrier()
        self.is_new = is_other
        self._streams: dict[str, Stream] = {}

    @property
    def size(self) -> int:
        """Bytes that it takes of the disk."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())

    def stream(self, name: str, n: int, length: int, n_embd: int) -> Stream:
        """Opens a stream, or makes one."""
        self._streams[name] = stream = Stream(self.folder / f"{name}.f32", (n, length, n_embd))
        return stream

    def save(self, name: str, content: Any) -> None:
        """Saves tensors and plain values, whole or not at all."""
        path = self.folder / f"{name}.pt"
        if rank() == 0:
            torch.save(content, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)

    def load(self, name: str) -> Any:
        """What was saved, or None."""
        path = self.folder / f"{name}.pt"
        return torch.load(path, weights_only=True) if path.is_file() else None

    def remove_stream(self, name: str) -> None:
        """Forgets a stream."""
        del self._streams[name]
        if rank() == 0:
            (self.folder / f"{name}.f32").unlink()

    def remove_streams_before(self, i: int, keep: str | None = None) -> None:
        """Forget the streams that led to layer i, but for one whose name is given."""
        for name in [name for name in self._streams if name.rpartition("-")[2] == str(i) and name != keep]:
            del self._streams[name]
        if rank() == 0:
            for path in self.folder.glob(f"*-{i}.f32"):
                if path.stem != keep:
                    path.unlink()

    def remove(self) -> None:
        """Ends the work."""
        self._streams.clear()
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def scratch_beside(out_dir: Path, kind: str, windows: torch.Tensor, keys: Any) -> Scratch:
    """A hidden folder beside `out_dir`, found again by the same work.

    Args:
        out_dir: Where the result will go.
        kind: What is done, which ends the folder's name.
        windows: The tokens that it is done with, of any shape.
        keys: What else the work depends on, told apart by its `repr`.
    """
    digest = hashlib.sha256(windows.numpy().tobytes())
    digest.update(repr([keys, tuple(windows.shape), version()]).encode())
    folder = Path(out_dir).resolve()
    return Scratch(folder.with_name(f".{folder.name}.{kind}"), digest.hexdigest())
