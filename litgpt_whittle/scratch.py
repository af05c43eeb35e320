"""Scratch files for layer-by-layer work: activations that do not fit into memory, and state to resume from."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt_whittle.manifest import digest
from litgpt_whittle.processes import barrier, rank, world_size
from litgpt_whittle.registry import version
from litgpt_whittle.tensors import save_tensors, to_device


class ActivationFile:
    """Memory-mapped file of hidden states, indexed by window: float32, shape (N, T, n_embd).

    Args:
        path: The file, created if it does not exist.
        shape: Shape of the hidden states.
        device: Device of the states that are read and written.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], device: torch.device) -> None:
        # several processes may open the file at once, so its content must stay
        with open(path, "ab") as file:
            file.truncate(4 * math.prod(shape))
        self._states, self.device = np.memmap(path, np.float32, "r+", shape=shape), device
        self._coming: tuple[slice, torch.Tensor, Any] | None = None
        """The copy to main memory in progress, if any: its windows, its result, and the CUDA event at its end"""

    def __getitem__(self, windows: slice) -> torch.Tensor:
        self._write_coming()
        return to_device(torch.from_numpy(np.array(self._states[windows])), self.device)

    def __setitem__(self, windows: slice, states: torch.Tensor) -> None:
        self._write_coming()
        states = states.float()
        if states.device.type != "cuda":
            self._states[windows] = states.cpu().numpy()
            return
        # written at the next access, so that the device computes meanwhile
        host = torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._coming = windows, host, copied

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the hidden states at these positions, counted over all windows concatenated: shape (n, n_embd)."""
        self._write_coming()
        found = self._states.reshape(-1, self._states.shape[-1])[rows.numpy()]
        return to_device(torch.from_numpy(found), self.device)

    def flush(self) -> None:
        self._write_coming()
        self._states.flush()

    def _write_coming(self) -> None:
        if self._coming is not None:
            windows, host, copied = self._coming
            copied.synchronize()
            self._states[windows], self._coming = host.numpy(), None


class DeviceActivations:
    """Replacement for `ActivationFile` in a device's memory; its content is lost when the process ends.

    Args:
        shape: Shape of the hidden states.
        device: Device of the hidden states.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self._states = torch.empty(shape, device=device)

    def __getitem__(self, windows: slice) -> torch.Tensor:
        return self._states[windows]

    def __setitem__(self, windows: slice, states: torch.Tensor) -> None:
        self._states[windows] = states

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the hidden states at these positions, counted over all windows concatenated: shape (n, n_embd)."""
        return self._states.flatten(0, 1).index_select(0, to_device(rows, self._states.device))

    def flush(self) -> None:
        """Do nothing; there is no file."""


class OwnActivations:
    """Hidden states of the batches that this process writes, in its device's memory, read by the same slices.

    A replacement for `ActivationFile` if several processes work on their own batches; its content is lost when the
    process ends.

    Args:
        device: Device of the hidden states.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._batches: dict[int, torch.Tensor] = {}
        """Hidden states by the first window of the batch"""

    def __getitem__(self, windows: slice) -> torch.Tensor:
        return self._batches[windows.start]

    def __setitem__(self, windows: slice, states: torch.Tensor) -> None:
        if windows.start not in self._batches:
            self._batches[windows.start] = torch.empty(states.shape, device=self.device)
        self._batches[windows.start].copy_(states)

    def flush(self) -> None:
        """Do nothing; there is no file."""


Activations = ActivationFile | DeviceActivations | OwnActivations
SharedActivations = ActivationFile | DeviceActivations
"""Activations whose windows any process can read, wherever they were written"""


class Scratch:
    """Folder for streams (hidden states of all calibration windows before one layer) and finished layers.

    Args:
        folder: Path of the folder, created if it does not exist.
        key: Identifies the inputs and settings of the work. Content with another key is deleted.

    Attributes:
        device: Device of the work.
        budget: Remaining bytes of the device's memory for streams, the same on all processes. Streams that do not fit
            are files.

    Several processes may share a folder; only rank 0 creates it, saves to it and removes it.
    """

    device = torch.device("cpu")
    budget = 0

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
        self._streams: dict[str, Activations] = {}
        self._n_bytes: dict[str, int] = {}
        """Bytes of the streams in the device's memory"""

    @property
    def size(self) -> int:
        """Disk usage in bytes."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())

    def stream(self, name: str, n: int, length: int, n_embd: int, is_shared: bool = True) -> Activations:
        """Open a stream, or create it if it does not exist.

        Args:
            name: Name of the stream.
            n: Number of windows.
            length: Tokens per window.
            n_embd: Channels of the hidden states.
            is_shared: If true, a process may read windows that other processes have written. Several processes then
                need a file. If false, each process reads only the slices that it has written.
        """
        if name not in self._streams:
            shape, path, n_processes = (n, length, n_embd), self.folder / f"{name}.f32", world_size()
            n_bytes = 4 * math.prod(shape) // n_processes
            fits = n_bytes <= self.budget and not path.exists()
            if fits and (n_processes == 1 or not is_shared):
                whole = n_processes == 1
                self._streams[name] = DeviceActivations(shape, self.device) if whole else OwnActivations(self.device)
                self._n_bytes[name] = n_bytes
                self.budget -= n_bytes
            else:
                self._streams[name] = ActivationFile(path, shape, self.device)
        return self._streams[name]

    def has_streams(self, *names: str) -> bool:
        """Return whether these streams exist with complete content, possibly from an interrupted run."""
        if (self.folder / "incomplete").exists():
            return False
        return all(name in self._streams or (self.folder / f"{name}.f32").is_file() for name in names)

    def save(self, name: str, content: Any) -> None:
        """Save tensors and plain values atomically."""
        path = self.folder / f"{name}.pt"
        if rank() == 0:
            save_tensors(content, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)

    def load(self, name: str) -> Any:
        """Return the content saved under a name, with tensors in CPU memory; None if there is no such content."""
        path = self.folder / f"{name}.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None

    def remove_stream(self, name: str) -> None:
        """Close a stream and delete its file."""
        self._close(name)
        if rank() == 0:
            (self.folder / f"{name}.f32").unlink(missing_ok=True)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Delete all streams, and mark new streams as incomplete until the context ends."""
        barrier()  # until all processes have called `has_streams`
        mark = self.folder / "incomplete"
        for name in list(self._streams):
            self._close(name)
        if rank() == 0:
            mark.touch()
            for path in self.folder.glob("*.f32"):
                path.unlink()
        barrier()
        yield
        for stream in self._streams.values():
            stream.flush()
        barrier()
        if rank() == 0:
            mark.unlink()

    def _close(self, name: str) -> None:
        del self._streams[name]
        self.budget += self._n_bytes.pop(name, 0)

    def remove_streams_before(self, i: int, keep: str | None = None) -> None:
        """Delete the streams of hidden states before layer i, except the stream named `keep`."""
        for name in [name for name in self._streams if name.rpartition("-")[2] == str(i) and name != keep]:
            self._close(name)
        if rank() == 0:
            for path in self.folder.glob(f"*-{i}.f32"):
                if path.stem != keep:
                    path.unlink()

    def remove(self) -> None:
        """Close all streams and delete the folder."""
        self._streams.clear()
        if rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def scratch_beside(out_dir: Path, kind: str, windows: torch.Tensor, inputs: Mapping[str, Any]) -> Scratch:
    """Open a hidden scratch folder next to `out_dir`, whose content is reused only for the same inputs and settings.

    Args:
        out_dir: Output directory of the work.
        kind: Name of the work, used as the folder's suffix.
        windows: Token ids that the work depends on, of any shape.
        inputs: Manifest of the other inputs and settings that the work depends on (`litgpt_whittle.manifest`).
    """
    tokens = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    manifest = {**inputs, "tokens": tokens, "shape": list(windows.shape), "version": version()}
    folder = Path(out_dir).resolve()
    return Scratch(folder.with_name(f".{folder.name}.{kind}"), digest(manifest))
