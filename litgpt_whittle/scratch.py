"""Scratch files for layer-by-layer work: activations that do not fit into memory, and state to resume from."""

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
from litgpt_whittle.tensors import save_tensors


class Stream:
    """Memory-mapped file of hidden states, indexed by window: float32, shape (N, T, n_embd)."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        # several processes may open it at once, so it must keep its content
        with open(path, "ab") as file:
            file.truncate(4 * math.prod(shape))
        self._states = np.memmap(path, np.float32, "r+", shape=shape)

    def __getitem__(self, windows: slice) -> torch.Tensor:
        return torch.from_numpy(np.array(self._states[windows]))

    def __setitem__(self, windows: slice, states: torch.Tensor) -> None:
        self._states[windows] = states.cpu().numpy()

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the hidden states at these positions, counted over all windows concatenated: shape (n, n_embd)."""
        return torch.from_numpy(self._states.reshape(-1, self._states.shape[-1])[rows.numpy()])

    def flush(self) -> None:
        self._states.flush()


class Scratch:
    """Folder for streams and finished layers.

    Args:
        folder: Path of the folder, created if it does not exist.
        key: Identifies the inputs and settings of the work. Content with another key is deleted.

    Several processes may share a folder; only rank 0 creates, saves and removes.
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
        """Disk usage in bytes."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())

    def stream(self, name: str, n: int, length: int, n_embd: int) -> Stream:
        """Open a stream; create it if it does not exist."""
        self._streams[name] = stream = Stream(self.folder / f"{name}.f32", (n, length, n_embd))
        return stream

    def save(self, name: str, content: Any) -> None:
        """Save tensors and plain values atomically."""
        path = self.folder / f"{name}.pt"
        if rank() == 0:
            save_tensors(content, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)

    def load(self, name: str) -> Any:
        """Return the saved content, with tensors in CPU memory; None if there is none."""
        path = self.folder / f"{name}.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None

    def remove_stream(self, name: str) -> None:
        """Close a stream and delete its file."""
        del self._streams[name]
        if rank() == 0:
            (self.folder / f"{name}.f32").unlink()

    def remove_streams_before(self, i: int, keep: str | None = None) -> None:
        """Delete the streams before layer i, except the one named `keep`."""
        for name in [name for name in self._streams if name.rpartition("-")[2] == str(i) and name != keep]:
            del self._streams[name]
        if rank() == 0:
            for path in self.folder.glob(f"*-{i}.f32"):
                if path.stem != keep:
                    path.unlink()

    def remove(self) -> None:
        """Close all streams and delete the folder."""
        self._streams.clear()
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def scratch_beside(out_dir: Path, kind: str, windows: torch.Tensor, keys: Any) -> Scratch:
    """Open a hidden scratch folder next to `out_dir`, whose content is reused only for the same inputs and settings.

    Args:
        out_dir: Output directory of the work.
        kind: Name of the work, used as the folder's suffix.
        windows: Token ids that the work depends on, of any shape.
        keys: Other inputs and settings that the work depends on, compared by their `repr`.
    """
    digest = hashlib.sha256(windows.numpy().tobytes())
    digest.update(repr([keys, tuple(windows.shape), version()]).encode())
    folder = Path(out_dir).resolve()
    return Scratch(folder.with_name(f".{folder.name}.{kind}"), digest.hexdigest())
