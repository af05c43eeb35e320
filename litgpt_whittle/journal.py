"""Journal of a search: an append-only record of its evaluations, from which searches resume and reports are made.

A journal is a JSON Lines file. The first line is the header, which holds everything that the scores depend on (teacher,
data, settings); every other line is one evaluation.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import lock_dir, write_text
from litgpt_whittle.manifest import check_unchanged
from litgpt_whittle.processes import on_rank_zero

JOURNAL = "journal.jsonl"
"""File name in a search's folder"""

VERSION = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of scoring a candidate."""

    scores: dict[str, float | None]
    """Measured values by name; None stands for infinities and NaNs"""
    batches: int
    """Number of validation batches that the candidate was scored on"""
    tokens: int
    """Number of predicted tokens in these batches"""
    seconds: float
    """Duration of scoring, in seconds"""
    error: str | None = None
    """Reason for a failed evaluation"""
    dropped: bool = False
    """True if a race dropped the candidate; its scores are then estimates from the batches evaluated so far"""
    losses: list[float] | None = None
    """Mean loss of each window in nats per token, for a candidate that finished a race"""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Outcome):
    """A candidate and the result of scoring it."""

    index: int
    """Position in the journal, from 0"""
    bin: str
    """Bin of the candidate"""
    subnet: dict[str, Any]
    """Sub-network, as returned by `SubNet.to_dict`"""
    n_params: int
    """Number of parameters"""
    seed: int
    """The search's seed"""
    origin: str | None = None
    """Name of the heuristic that built the candidate, if it is one of the search's simple starting points"""

    def score(self, name: str) -> float:
        """Return a score; infinite if the candidate has none."""
        value = self.scores.get(name)
        return math.inf if value is None else value

    @property
    def measures(self) -> dict[str, float]:
        """Number of parameters and all scores, by name."""
        return {"n_params": float(self.n_params), **{name: self.score(name) for name in self.scores}}

    def measure(self, name: str) -> float:
        """Return one of `measures`; infinite if the candidate has none."""
        return self.measures.get(name, math.inf)


class Journal:
    """Journal that is open for writing, as a context manager.

    Args:
        path: Journal file.
        header: Everything that the scores depend on: sections of plain values.
        resume: Continue the existing journal instead of creating one.

    Raises:
        UserError: If there is no journal to resume, if a journal exists and `resume` is false, or if the journal is
            damaged or has a different header.
    """

    def __init__(self, path: Path, header: Mapping[str, Mapping[str, Any]], resume: bool = False) -> None:
        self.path = Path(path)
        self.header = _plain({"version": VERSION, **header})
        self.evaluations: list[Evaluation] = []
        check_resumable(self.path, resume)
        if resume:
            found, self.evaluations, n_bytes = _read(self.path)
            work = f"the search in {str(self.path)!r}"
            check_unchanged(work, found, self.header, "begin in another out_dir")
        else:
            # written atomically, so that a journal always has its header
            write_text(self.path, _line(self.header))
            n_bytes = self.path.stat().st_size
        self._file = open(self.path, "r+b")
        self._file.truncate(n_bytes)  # drops a line that a killed process left incomplete
        self._file.seek(0, os.SEEK_END)

    def append(self, evaluation: Evaluation) -> None:
        """Append an evaluation and flush it to disk before returning."""
        assert evaluation.index == len(self.evaluations), "evaluations are numbered in the order of the journal"
        self._file.write(_line(asdict(evaluation)).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.evaluations.append(evaluation)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


@contextmanager
def open_record(
    path: Path, header: Mapping[str, Mapping[str, Any]], resume: bool = False, is_locked: bool = False
) -> Iterator[Journal | MirroredJournal]:
    """Open a journal that all processes share: rank 0 writes the file, and other ranks keep a copy in memory.

    The folder is locked while the journal is open, unless the caller has locked it already (`is_locked`).

    Raises:
        UserError: As `Journal` does, or if other processes have locked the folder.
    """
    journal = None
    with ExitStack() as stack:

        def open_it() -> list[Evaluation]:
            nonlocal journal
            if not is_locked:
                stack.enter_context(lock_dir(path.parent))
            journal = stack.enter_context(Journal(path, header, resume))
            return journal.evaluations

        evaluations = on_rank_zero(open_it)
        yield MirroredJournal(evaluations) if journal is None else journal


@dataclass
class MirroredJournal:
    """In-memory copy of a journal that another process writes."""

    evaluations: list[Evaluation]

    def append(self, evaluation: Evaluation) -> None:
        """Add an evaluation that the other process writes to the file."""
        self.evaluations.append(evaluation)


def read_journal(path: Path) -> tuple[dict[str, Any], list[Evaluation]]:
    """Return a journal's header and evaluations, even while a search is writing it.

    Raises:
        UserError: If there is no journal, or a line other than the last is damaged.
    """
    header, evaluations, _ = _read(Path(path))
    return header, evaluations


def read_header(path: Path) -> dict[str, Any]:
    """Return only a journal's header; empty if the first line is damaged, for which `Journal` raises an error."""
    with open(path, "rb") as file:
        try:
            header = json.loads(file.readline())
        except ValueError:
            return {}
    return header if isinstance(header, dict) else {}


def check_resumable(path: Path, resume: bool) -> None:
    """Raise UserError if there is no journal to resume, or if one exists and `resume` is false."""
    if resume and not Path(path).is_file():
        raise UserError(f"there is nothing to resume, {str(path)!r} does not exist; leave out --resume to begin")
    if not resume and Path(path).exists():
        raise UserError(
            f"{str(path)!r} holds a search already; continue it with --resume true or choose another out_dir"
        )


def _read(path: Path) -> tuple[dict[str, Any], list[Evaluation], int]:
    """Return the header, the evaluations, and the number of bytes up to the end of the last complete line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the journal {str(path)!r}: {error.strerror}; check the path") from None
    lines = content.split(b"\n")
    whole, torn = lines[:-1], lines[-1]
    records: list[Any] = []
    for number, line in enumerate(whole, 1):
        try:
            records.append(json.loads(line) if number == 1 else Evaluation(**json.loads(line)))
        except (ValueError, TypeError):
            if number == len(whole) and number > 1 and not torn:
                # after a crash the file may have its new length, but not yet the bytes of the last line
                return records[0], records[1:], len(content) - len(line) - 1
            raise UserError(f"line {number} of the journal {str(path)!r} is damaged; restore it from a copy") from None
    if not records or not isinstance(records[0], dict) or "version" not in records[0]:
        raise UserError(f"{str(path)!r} is not the journal of a search; choose another out_dir")
    for number, evaluation in enumerate(records[1:]):
        if evaluation.index != number:
            raise UserError(f"the journal {str(path)!r} lacks evaluation {number}; restore it from a copy")
    return records[0], records[1:], len(content) - len(torn)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as they are read back from the file."""
    return json.loads(_line(values))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, default=str) + "\n"
