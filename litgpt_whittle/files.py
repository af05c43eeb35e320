"""Files and folders that are either wholly there or not at all, whenever the process may die."""

from __future__ import annotations

import ctypes
import hashlib
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
from litgpt_whittle.hf.tokenizer_files import TEMPLATES

LOCK = ".lock"
"""What keeps a second process out of a folder"""

PATIENCE = 60
"""Seconds that another process is given to leave a folder; a training that is told to stop saves first"""


class MappedWeights(dict):
    """Weights that are memory-mapped from a file and never written to."""

    def forget(self, name: str) -> None:
        """Gives a tensor's pages back to the system, which reads them again if they are needed again.

        So a teacher can be read through one tensor after the other in little memory.
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
    """Lists on one line, mappings a line per key."""


_Dumper.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def to_yaml(content: Mapping[str, Any]) -> str:
    """Compact YAML: a line per key, in the order given."""
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, width=2**16, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Reads `1e-5` as a number, as YAML 1.2 and jsonargparse do; YAML 1.1 asks for a point and a sign in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def from_yaml(text: str) -> Any:
    """Return the content of a YAML text."""
    return yaml.load(text, Loader=_Loader)


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
def new_folder(path: Path, replaces: bool = True) -> Iterator[Path]:
    """Gives a folder beside `path` to fill; it takes `path`'s place when the block ends without an error.

    An older `path` is replaced; in the instant between, it lies beside under a hidden name, never half-written. With
    `replaces` false, what another process has put there is kept, and the new folder dropped.
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
    try:
        with tempfile.TemporaryFile(dir=nearest):  # permissions alone do not tell
            pass
    except OSError as error:
        raise UserError(
            f"out_dir must be writable, got {str(folder)!r} ({error.strerror}); choose another or change permissions"
        ) from None


def check_out_dir(out_dir: Path, overwrite: bool, needed: Iterable[Path], marker: str) -> None:
    """Refuses an output directory that cannot be written, or whose contents would be lost.

    Args:
        out_dir: The directory, which `new_folder` will fill.
        overwrite: Whether what is in it may be replaced, if it is a checkpoint.
        needed: What is read, and must not be in it.
        marker: The file, or a pattern of it, that tells a checkpoint of the kind that will be written.

    Raises:
        UserError: For the first such mistake.
    """
    check_writable(out_dir)
    # it is written beside and renamed into place
    check_writable(out_dir.resolve().parent)
    if not out_dir.exists() or not any(out_dir.iterdir()):
        return
    shown = repr(str(out_dir))
    if not overwrite:
        raise UserError(f"out_dir must be empty or new, got {shown}; choose another or add --overwrite true")
    for path in needed:
        if path.resolve().is_relative_to(out_dir.resolve()):
            raise UserError(f"out_dir must not hold what is read, got {shown} with {str(path)!r}; choose another")
    if not any(out_dir.glob(marker)) or any(entry.is_dir() and entry.name != TEMPLATES for entry in out_dir.iterdir()):
        raise UserError(f"--overwrite replaces a checkpoint and nothing else, got {shown}; choose another out_dir")


def check_space(folder: Path, n_bytes: int, what: str) -> None:
    """Refuses to write more than the disk has room for.

    Args:
        folder: Where it goes; the folder need not be there yet.
        n_bytes: How much.
        what: What it is, for people.

    Raises:
        UserError: If there is less room.
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
    """Sixteen hex digits that tell files apart by their size and 64 parts of them, wherever they lie."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for part in range(64):
            file.seek(part * max(size - 2**12, 0) // 63)
            digest.update(file.read(2**12))
    return digest.hexdigest()[:16]


def readable_size(n_bytes: float) -> str:
    """Bytes as people read them."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def lock(file: IO[Any]) -> bool:
    """Keeps an open file to this process and those that it hands it to, until all of them have closed it or ended.

    Returns:
        Whether no other process has it; also where there are no locks.
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
def claimed(out_dir: Path) -> Iterator[IO[Any]]:
    """Keeps other processes out of a folder while the block runs, and after it any that the block's file is handed to.

    Of the folder nothing is left but what the block leaves there.

    Raises:
        UserError: If another process is at work in it, and still is after `PATIENCE`.
    """
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    file = _claim(out_dir)
    try:
        yield file
    finally:
        with suppress(OSError):  # on Windows; or there is more in the folders
            (out_dir / LOCK).unlink()
            for folder in made:
                folder.rmdir()
        file.close()


def _claim(out_dir: Path) -> IO[Any]:
    deadline, is_told = time.monotonic() + PATIENCE, False
    while True:
        with suppress(FileNotFoundError):  # whoever had the folder may have removed it
            out_dir.mkdir(parents=True, exist_ok=True)
            file = open(out_dir / LOCK, "a")
            # a file that was removed in between keeps nobody out
            if lock(file) and os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                return file
            file.close()
        if time.monotonic() >= deadline:
            raise UserError(f"another process is at work in out_dir {str(out_dir)!r}; wait for it, or choose another")
        if not is_told:
            print("Another process is at work in out_dir, maybe one that still saves; waiting", flush=True)
            is_told = True
        time.sleep(1)
