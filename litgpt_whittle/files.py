"""Files and folders written atomically, even if the process dies, and locks on folders."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from litgpt_whittle.errors import UserError
from litgpt_whittle.tokenizer_files import TEMPLATES

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the file that locks a folder against other processes"""

PATIENCE = 60
"""Seconds to wait for another process to release a folder; an interrupted training saves before it ends"""


class MappedWeights(dict):
    """Read-only weights, memory-mapped from a file."""

    def forget(self, name: str) -> None:
        """Release a tensor's memory pages, which the system reads again on the next access.

        This limits memory use when a large teacher is read tensor by tensor.
        """
        tensor: torch.Tensor = self[name]
        if not sys.platform.startswith("linux"):
            return
        page = os.sysconf("SC_PAGE_SIZE")
        start = -(-tensor.data_ptr() // page) * page
        length = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // page * page
        if length > 0:
            madv_dontneed = 4
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), madv_dontneed)


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line and mappings with a line per key."""


_Dumper.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def to_yaml(content: Mapping[str, Any]) -> str:
    """Return compact YAML with a line per key, in the given order."""
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, width=2**16, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Reads `1e-5` as a number, like YAML 1.2 and jsonargparse; YAML 1.1 requires a point and a sign."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def from_yaml(text: str) -> Any:
    """Parse a YAML text."""
    return yaml.load(text, Loader=_Loader)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: write a temporary file next to it and rename that file."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)  # after a failure


@contextmanager
def new_folder(path: Path, replaces: bool = True) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, and rename it to `path` if the block ends without an error.

    An older `path` is replaced: it is renamed to a hidden name first, so that no half-written folder ever exists. If
    `replaces` is false and another process has created `path`, that folder is kept, and the new one removed.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    old = path.with_name(f".{path.name}.old.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for file in filter(Path.is_file, beside.rglob("*")):
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if replaces and path.exists():
            os.replace(path, old)
        try:
            os.replace(beside, path)
        except OSError:
            if replaces or not path.is_dir():
                raise
            shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def check_writable(folder: Path) -> None:
    """Check that a folder can be created and written to, without creating it.

    Raises:
        UserError: If `folder` is a file, or if `folder` or its nearest existing parent is not writable.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out_dir must be a folder, got the file {str(folder)!r}; choose another")
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):  # permissions alone are not conclusive
            pass
    except OSError as error:
        raise UserError(
            f"out_dir must be writable, got {str(folder)!r} ({error.strerror}); choose another or change permissions"
        ) from None


def check_out_dir(out_dir: Path, overwrite: bool, needed: Iterable[Path], marker: str) -> None:
    """Check that an output directory can be written without losing other contents.

    Args:
        out_dir: The directory, which `new_folder` will fill.
        overwrite: If true, a checkpoint in the directory may be replaced.
        needed: Input files, which must not be in the directory.
        marker: Name or pattern of the file that identifies a checkpoint of the kind to write.

    Raises:
        UserError: For the first failed check.
    """
    check_writable(out_dir)
    # the directory is written under a temporary name next to its place, then renamed
    check_writable(out_dir.resolve().parent)
    if not out_dir.exists() or not any(out_dir.iterdir()):
        return
    shown = repr(str(out_dir))
    if not overwrite:
        raise UserError(f"out_dir must be empty or new, got {shown}; choose another or add --overwrite true")
    for path in needed:
        if path.resolve().is_relative_to(out_dir.resolve()):
            raise UserError(f"out_dir must not contain input files, got {shown} with {str(path)!r}; choose another")
    if not any(out_dir.glob(marker)) or any(entry.is_dir() and entry.name != TEMPLATES for entry in out_dir.iterdir()):
        raise UserError(f"--overwrite only replaces checkpoints, got {shown}; choose another out_dir")


def check_space(folder: Path, n_bytes: int, what: str) -> None:
    """Check that the disk has room for an output.

    Args:
        folder: Folder of the output, which need not exist yet.
        n_bytes: Size of the output in bytes.
        what: Name of the output, for the message.

    Raises:
        UserError: If the disk has less free space than `n_bytes`.
    """
    nearest = Path(folder).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    if free < n_bytes:
        raise UserError(
            f"{what} takes {readable_size(n_bytes)} and {str(nearest)!r} has {readable_size(free)} left; free some "
            "space or choose another out_dir"
        )


def file_fingerprint(path: Path) -> str:
    """Return a fingerprint of a file, 16 hex digits, from its size and 64 samples of its contents."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for part in range(64):
            file.seek(part * max(size - 2**12, 0) // 63)
            digest.update(file.read(2**12))
    return digest.hexdigest()[:16]


def readable_size(n_bytes: float) -> str:
    """Format bytes as MB or GB."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def lock(file: IO[Any]) -> bool:
    """Lock an open file for this process and processes that inherit it, until all of them have closed it or ended.

    Returns:
        False if another process holds the lock; True if the lock was taken, or the system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


@contextmanager
def lock_dir(folder: Path, out_dir: Path | None = None) -> Iterator[IO[Any]]:
    """Lock a folder against other processes while the block runs.

    The lock lasts until processes that inherit the yielded file have ended, too. On exit, the lock file is removed, and
    so are the folders that this function created, if they are empty.

    Args:
        folder: The folder.
        out_dir: The folder to name in messages, if `folder` exists only to hold its lock.

    Raises:
        UserError: If another process still holds the lock after `PATIENCE`.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists() or (out_dir and path == folder)]
    file = _claim(folder, out_dir or folder)
    try:
        yield file
    finally:
        with suppress(OSError):  # on Windows, or if the folders are not empty
            (folder / LOCK).unlink()
            for path in made:
                path.rmdir()
        file.close()


def _claim(folder: Path, out_dir: Path) -> IO[Any]:
    deadline, is_announced = time.monotonic() + PATIENCE, False
    while True:
        with suppress(FileNotFoundError):  # the previous owner may have removed the folder
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / LOCK, "a")
            # a lock is void if another process has removed the file in between
            if lock(file) and os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                return file
            file.close()
        if time.monotonic() >= deadline:
            raise UserError(f"another process is at work in out_dir {str(out_dir)!r}; wait for it, or choose another")
        if not is_announced:
            logger.info("Another process is at work in out_dir and may still be saving; waiting for it")
            is_announced = True
        time.sleep(1)
