"""Every evaluation of a search, written down as it ends: what resuming, plots and tables read.

A journal is a file of JSON lines that only grows. Its first line says what the scores depend on (teacher, data,
settings); every other line is one evaluation.
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
from litgpt_whittle.files import claimed, write_text
from litgpt_whittle.processes import first_does

JOURNAL = "journal.jsonl"
"""Its name in a search's folder"""

VERSION = 3


@dataclass(frozen=True)
class Evaluation:
    """One candidate and how it fared."""

    index: int
    """Position in the journal, from 0"""
    bin: str
    """The bin that it was built into"""
    subnet: dict[str, Any]
    """The sub-network, as `SubNet.to_dict` gives it"""
    n_params: int
    """Its parameters"""
    scores: dict[str, float | None]
    """What it was measured to be; None where that is no finite number"""
    seed: int
    """The search's seed"""
    batches: int
    """Validation batches that it was scored on"""
    tokens: int
    """Predicted tokens in them"""
    seconds: float
    """How long scoring took"""
    error: str | None = None
    """Why it could not be scored"""
    dropped: bool = False
    """Whether it fell behind in a race: its scores are estimates from what it saw"""
    losses: list[float] | None = None
    """The mean loss of each window, of one that a race has seen to the end"""
    origin: str | None = None
    """The simple idea that it was built by, of one that the search began with"""

    def score(self, name: str) -> float:
        """A score, infinite where the candidate has none."""
        value = self.scores.get(name)
        return math.inf if value is None else value

    @property
    def measures(self) -> dict[str, float]:
        """All that is known of the candidate, by name: its parameters and whatever it was measured to be."""
        return {"n_params": float(self.n_params), **{name: self.score(name) for name in self.scores}}

    def measure(self, name: str) -> float:
        """One of `measures`, infinite where the candidate has none."""
        return self.measures.get(name, math.inf)


class Journal:
    """A journal open for writing: a context manager.

    Args:
        path: The file.
        header: What the scores depend on: sections of plain values.
        resume: Go on with the journal that is there, instead of beginning one.

    Raises:
        UserError: If there is nothing to resume, or something when nothing should be there; if the journal is
            damaged, or was written under another header.
    """

    def __init__(self, path: Path, header: Mapping[str, Mapping[str, Any]], resume: bool = False) -> None:
        self.path = Path(path)
        self.header = _plain({"version": VERSION, **header})
        self.evaluations: list[Evaluation] = []
        check_resumable(self.path, resume)
        if resume:
            found, self.evaluations, n_bytes = _read(self.path)
            _check_same(found, self.header, self.path)
        else:
            # whole or not at all, so that a journal always has its header
            write_text(self.path, _line(self.header))
            n_bytes = self.path.stat().st_size
        self._file = open(self.path, "r+b")
        self._file.truncate(n_bytes)  # cuts off what a killed process left half-written
        self._file.seek(0, os.SEEK_END)

    def append(self, evaluation: Evaluation) -> None:
        """Writes an evaluation to the disk before it returns."""
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
    path: Path, header: Mapping[str, Mapping[str, Any]], resume: bool = False, is_claimed: bool = False
) -> Iterator[Journal | MirroredJournal]:
    """Opens the one journal that several processes share: the first one writes it, the others follow in memory.

    Its folder belongs to them while it is open, as it does already where it `is_claimed`.

    Raises:
        UserError: As `Journal` does, or if other processes are at work in its folder.
    """
    journal = None
    with ExitStack() as stack:

        def open_it() -> list[Evaluation]:
            nonlocal journal
            if not is_claimed:
                stack.enter_context(claimed(path.parent))
            journal = stack.enter_context(Journal(path, header, resume))
            return journal.evaluations

        evaluations = first_does(open_it)
        yield MirroredJournal(evaluations) if journal is None else journal


@dataclass
class MirroredJournal:
    """What a journal holds that another process writes."""

    evaluations: list[Evaluation]

    def append(self, evaluation: Evaluation) -> None:
        """Takes note of what the other process writes."""
        self.evaluations.append(evaluation)


def read_journal(path: Path) -> tuple[dict[str, Any], list[Evaluation]]:
    """Reads a journal's header and evaluations, also while a search is writing it.

    Raises:
        UserError: If there is none, or it is damaged elsewhere than in its last line.
    """
    header, evaluations, _ = _read(Path(path))
    return header, evaluations


def read_header(path: Path) -> dict[str, Any]:
    """Read a journal's header alone; empty where its first line is damaged, which `Journal` refuses."""
    with open(path, "rb") as file:
        try:
            header = json.loads(file.readline())
        except ValueError:
            return {}
    return header if isinstance(header, dict) else {}


def check_resumable(path: Path, resume: bool) -> None:
    """Refuses to resume where there is no journal, and to begin where there is one.

    Raises:
        UserError: In both cases.
    """
    if resume and not Path(path).is_file():
        raise UserError(f"there is nothing to resume, {str(path)!r} does not exist; leave out --resume to begin")
    if not resume and Path(path).exists():
        raise UserError(
            f"{str(path)!r} holds a search already; continue it with --resume true or choose another out_dir"
        )


def _read(path: Path) -> tuple[dict[str, Any], list[Evaluation], int]:
    """Header, evaluations, and the bytes up to the end of the last whole line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the journal {str(path)!r}: {error.strerror}") from None
    lines = content.split(b"\n")
    whole, torn = lines[:-1], lines[-1]
    records = []
    for number, line in enumerate(whole, 1):
        try:
            records.append(json.loads(line) if number == 1 else Evaluation(**json.loads(line)))
        except (ValueError, TypeError):
            if number == len(whole) and number > 1 and not torn:
                # a file system may have lengthened the file before the line's bytes arrived
                return records[0], records[1:], len(content) - len(line) - 1
            raise UserError(f"line {number} of the journal {str(path)!r} is damaged; restore it from a copy") from None
    if not records or not isinstance(records[0], dict) or "version" not in records[0]:
        raise UserError(f"{str(path)!r} is no journal of a search; choose another out_dir")
    for number, evaluation in enumerate(records[1:]):
        if evaluation.index != number:
            raise UserError(f"the journal {str(path)!r} lacks evaluation {number}; restore it from a copy")
    return records[0], records[1:], len(content) - len(torn)


def _check_same(found: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    then, now = _flatten(found), _flatten(now)
    for name in [*now, *(name for name in then if name not in now)]:
        if then.get(name) != now.get(name):
            raise UserError(
                f"{str(path)!r} was written with {name} = {then.get(name)!r}, now it is {now.get(name)!r}; "
                "resume with the same, or begin in another out_dir"
            )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As the values come back from the file."""
    return json.loads(_line(values))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, default=str) + "\n"
