"""Sharded checkpoints: every process writes one part, so that no process holds a whole checkpoint in memory.

Of a tensor sharded by rows (`DTensor`), each process saves its rows. Reading returns `Rows`, from which any number of
processes take the rows that they need. Only the first process saves all other values. `torch.distributed.checkpoint` is
not used, because it unpickles its metadata without restrictions; these parts are loaded with `weights_only=True`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import new_folder
from litgpt_whittle.processes import gather, rank, world_size
from litgpt_whittle.tensors import map_tensors, save_tensors

_ROWS = "rows of a spread tensor"


class Rows:
    """A tensor whose rows are stored in several files.

    Args:
        pieces: Consecutive parts of the tensor, memory-mapped.
    """

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        self.pieces = pieces
        self.shape = torch.Size([sum(len(piece) for piece in pieces), *pieces[0].shape[1:]])

    def __getitem__(self, which: slice) -> torch.Tensor:
        """Read a slice of the rows."""
        start, stop, _ = which.indices(self.shape[0])
        found, at = [], 0
        for piece in self.pieces:
            found.append(piece[max(start - at, 0) : max(stop - at, 0)])
            at += len(piece)
        return torch.cat(found)


def save_parts(folder: Path, tree: dict[str, Any], fill: Callable[[Path], None]) -> None:
    """Write a folder atomically from all processes, each of which must call it.

    Args:
        folder: The folder; an older folder is replaced.
        tree: Nested dicts and lists of tensors, sharded or not, and of other values that `torch.save` accepts.
        fill: Writes further files into the given folder; called by the first process only.

    Raises:
        OSError: On all processes, if one of them cannot write.
    """
    is_spread = any(gather(_is_spread(tree)))
    with new_folder(folder) if rank() == 0 else nullcontext() as made:
        inside = cast(Path, gather(made)[0])
        _together(lambda: fill(inside) if rank() == 0 else None)
        _together(lambda: _save_part(inside, tree, is_spread))


def _together(write: Callable[[], None]) -> None:
    """Call `write` on every process; if it fails on one, raise OSError on all of them."""
    problem = None
    try:
        write()
    except (OSError, RuntimeError) as error:
        problem = str(error).splitlines()[0]
    for found in gather(problem):
        if found is not None:
            raise OSError(found)


def _save_part(folder: Path, tree: dict[str, Any], is_spread: bool) -> None:
    if rank() > 0 and not is_spread:
        return
    own = map_tensors(tree, _own if rank() == 0 else _own_if_spread)
    with open(folder / f"part-{rank():05d}-of-{world_size() if is_spread else 1:05d}.pth", "wb") as file:
        save_tensors(own, file)
        file.flush()
        os.fsync(file.fileno())


def part_paths(folder: Path) -> list[Path]:
    """Return the part files in a folder written by `save_parts`; empty for any other folder."""
    return sorted(Path(folder).glob("part-*-of-*.pth"))


def has_parts(folder: Path) -> bool:
    """Return whether a folder was written by `save_parts`."""
    return bool(part_paths(folder))


def read_parts(folder: Path, key: str) -> Any:
    """Read the value that `save_parts` wrote under a key, with `Rows` in place of sharded tensors.

    Raises:
        UserError: If a part is missing or damaged.
    """
    paths = part_paths(folder)
    n = int(re.findall(r"of-(\d+)", paths[0].name)[0])
    trees = []
    for i in range(n):
        path = Path(folder) / f"part-{i:05d}-of-{n:05d}.pth"
        if not path.is_file():
            raise UserError(f"{str(folder)!r} lacks {path.name}; copy all parts of the checkpoint, or use another")
        try:
            trees.append(torch.load(path, map_location="cpu", mmap=True, weights_only=True)[key])
        except Exception as error:
            raise UserError(f"{str(path)!r} cannot be read ({type(error).__name__}); use another checkpoint") from None
    return _join(trees)


def _is_spread(tree: Any) -> bool:
    found = []
    map_tensors(tree, lambda tensor: found.append(isinstance(tensor, DTensor)))
    return any(found)


def _own(tensor: torch.Tensor) -> Any:
    # a local part is a view; without a copy its whole storage would be saved
    return {_ROWS: tensor.to_local().cpu().clone()} if isinstance(tensor, DTensor) else tensor


def _own_if_spread(tensor: torch.Tensor) -> Any:
    return _own(tensor) if isinstance(tensor, DTensor) else None


def _join(trees: Sequence[Any]) -> Any:
    first = trees[0]
    if isinstance(first, dict) and _ROWS in first:
        return Rows([tree[_ROWS] for tree in trees])
    if isinstance(first, dict):
        return {key: _join([tree[key] for tree in trees]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_join(items) for items in zip(*trees))
    return first
