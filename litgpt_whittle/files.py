"""Files and folders that are either wholly there or not at all, whenever the process may die."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from litgpt_whittle.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames into place."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder beside `path` to fill; it takes `path`'s place when the block ends without an error.

    An older `path` is replaced; in the instant between, it lies beside under a hidden name, never half-written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    old = path.with_name(f".{path.name}.old.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for file in beside.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if path.exists():
            os.replace(path, old)
        os.replace(beside, path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be made or written to, without leaving anything behind.

    Raises:
        UserError: If it, or the nearest folder above it, cannot be written to.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out_dir must be a folder, got the file {str(folder)!r}; choose another")
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"out_dir must be writable, got {str(folder)!r}; choose another or change its permissions")
