"""Main loop of a search with racing: only the best candidates are evaluated on all of the data."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import write_text
from litgpt_whittle.fitness.base import WindowFitness
from litgpt_whittle.journal import Evaluation, Outcome
from litgpt_whittle.processes import rank
from litgpt_whittle.searching.args import RacingArgs
from litgpt_whittle.searching.loop import Loop, Search, check_replayed, finite, within_memory
from litgpt_whittle.searching.racing import estimate, losers, stages
from litgpt_whittle.strategies.base import Strategy
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.tensors import IGNORE_INDEX

NOTES = "race.jsonl"
"""File name of the current race's intermediate results in a search's folder"""


LEAST_BEHIND = 1e-6
"""Minimum margin between a dropped candidate's estimated loss and the worst loss that is kept"""


class Leg(NamedTuple):
    """A candidate's losses in one stage of a race."""

    sums: list[float]
    """Loss of each window, summed over its tokens"""
    seconds: float
    error: str | None = None
    costs: dict[str, float] = {}  # noqa: RUF012
    """Measures besides the losses, and the strategy's predictions; empty after the first stage"""


class RaceNotes:
    """Finished legs of the current race, kept on disk so that a killed search does not repeat them.

    Args:
        path: The file; deleted after every race.
        known: Contents of the file, as returned by `read`.
    """

    def __init__(self, path: Path, known: list[dict[str, Any]]) -> None:
        self.path = path
        self.legs = {(note["race"], note["candidate"], note["end"]): Leg(**note["leg"]) for note in known}
        if rank() == 0:  # drops an incomplete last line, because `read` stops at the first one
            write_text(path, "".join(f"{json.dumps(note)}\n" for note in known))

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Read the notes of an interrupted search, up to the first incomplete line."""
        notes = []
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                notes.append(json.loads(line))
            except ValueError:
                break
        return notes

    def add(self, race: str, candidate: int, end: int, leg: Leg) -> None:
        """Record a leg."""
        self.legs[race, candidate, end] = leg
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"race": race, "candidate": candidate, "end": end, "leg": leg._asdict()}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def clear(self) -> None:
        """Delete the notes of a race whose results are in the journal."""
        self.legs.clear()
        if rank() == 0:
            self.path.unlink(missing_ok=True)


class RacingLoop(Loop):
    """Loop that evaluates every batch of proposals in a race (`litgpt_whittle.searching.racing`).

    Args:
        rest: Positional arguments of `Loop`; the fitness must provide losses per window.
        racing: Settings of the race.
        notes: Stores intermediate results of the current race.
        more: Keyword arguments of `Loop`.
    """

    fitness: WindowFitness

    def __init__(self, *rest: Any, racing: RacingArgs, notes: RaceNotes, **more: Any) -> None:
        super().__init__(*rest, **more)
        self.racing, self.notes = racing, notes
        batches = self.fitness.batches
        self.n_tokens = np.concatenate([(batch.targets != IGNORE_INDEX).sum(1).cpu().numpy() for batch in batches])
        self.n_windows = np.cumsum([0, *(len(batch.targets) for batch in batches)])
        self.finished: dict[str, list[np.ndarray]] = {str(search.space.bin): [] for search in self.searches}

    def _round(self, search: Search, candidates: list[SubNet]) -> None:
        known = self.known_of(search, len(candidates))
        outcomes: list[Outcome] = [] if len(known) == len(candidates) else list(self._race(search, candidates))
        for i, candidate in enumerate(candidates):
            if i < len(known):
                check_replayed(known[i], search, candidate)
                self._finish(search, candidate, known[i])
            else:
                self._append(search, candidate, outcomes[i])
        self.notes.clear()

    def _finish(self, search: Search, candidate: SubNet, evaluation: Evaluation) -> None:
        super()._finish(search, candidate, evaluation)
        if evaluation.losses is not None:
            self.finished[evaluation.bin].append(np.array(evaluation.losses))

    def _race(self, search: Search, candidates: list[SubNet]) -> Iterator[Outcome]:
        """Run a race and yield one outcome per candidate, in their order."""
        n_kept = search.strategy.n_kept
        assert n_kept is not None, "a race needs one score that ranks the candidates"
        runners = [_Runner() for _ in candidates]
        left, begin = list(range(len(candidates))), 0
        for end in stages(self.racing, len(self.fitness.batches)):
            self._run_stage(search, candidates, left, runners, begin, end)
            left = [i for i in left if runners[i].error is None]
            n_seen = self.n_windows[end]
            seen = {i: self._means(runners[i].sums) for i in left}
            if end < len(self.fitness.batches) and seen:
                done = [losses[:n_seen] for losses in self.finished[str(search.space.bin)]]
                out = losers(seen, done, n_kept, self.racing.alpha)
                left = [i for i in left if i not in out]
            begin = end
        finished = [*self.finished[str(search.space.bin)], *(self._means(runners[i].sums) for i in left)]
        finished.sort(key=lambda losses: np.average(losses, weights=self.n_tokens))
        for i, runner in enumerate(runners):
            yield self._outcome(runner, i in left, finished, n_kept)

    def _run_stage(
        self, search: Search, candidates: list[SubNet], left: list[int], runners: list[_Runner], begin: int, end: int
    ) -> None:
        race = f"{search.space.bin} from {search.n_reported}"
        missing = [i for i in left if (race, i, end) not in self.notes.legs]
        run = partial(self._leg, search, which=slice(begin, end))
        for i, leg in zip(missing, self.parallel_map(lambda i: run(candidates[i]), missing)):
            self.notes.add(race, i, end, leg)
        for i in left:
            runners[i].add(self.notes.legs[race, i, end], end)

    def _leg(self, search: Search, candidate: SubNet, which: slice) -> Leg:
        started = time.perf_counter()
        costs, error = ({}, None) if which.start else search.costs(candidate)
        if not which.start:
            costs |= search.strategy.expects(candidate)
        sums: list[float] = []
        if error is None:
            sums = within_memory(self.fitness, lambda: self.fitness.losses(candidate, which)).sums.tolist()
            if not np.isfinite(sums).all():
                sums, error = [], "its loss is not finite"
        return Leg(sums, round(time.perf_counter() - started, 4), error, costs)

    def _outcome(self, runner: _Runner, is_finished: bool, finished: list[np.ndarray], n_kept: int) -> Outcome:
        """Return a candidate's outcome; `finished` holds the losses of fully evaluated candidates, the best first."""
        found, error, losses = runner.costs, runner.error, self._means(runner.sums)
        if error is None:
            if is_finished or not finished:
                loss = float(np.average(losses, weights=self.n_tokens[: len(losses)]))
            else:
                loss = estimate(losses, self.n_tokens, finished[0])
                # the test found it worse than the kept candidates, so its estimate must not be better
                kept = finished[:n_kept][-1]
                loss = max(loss, float(np.average(kept, weights=self.n_tokens)) + LEAST_BEHIND)
            found = self.fitness.scores(loss) | found
        scores, error = finite(found, error)
        return Outcome(
            scores=scores,
            batches=runner.batches,
            tokens=int(self.n_tokens[: len(losses)].sum()),
            seconds=round(runner.seconds, 4),
            error=error,
            dropped=error is None and not is_finished,
            losses=losses.tolist() if is_finished else None,
        )

    def _means(self, sums: list[float]) -> np.ndarray:
        """Return the mean loss of each window; 0 for a window without tokens."""
        return np.array(sums) / np.maximum(self.n_tokens[: len(sums)], 1)


class _Runner:
    """State of a candidate in a race."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self.costs: dict[str, float] = {}
        self.seconds, self.batches = 0.0, 0
        self.error: str | None = None

    def add(self, leg: Leg, end: int) -> None:
        self.seconds += leg.seconds
        self.costs |= leg.costs
        self.error = leg.error
        if leg.error is None:
            self.sums += leg.sums
            self.batches = end


def check_can_race(fitness: type, name: str, strategy: Strategy) -> None:
    """Check that the fitness and the strategy support racing.

    Raises:
        UserError: If the fitness has no losses per window, or the strategy needs exact scores of all candidates.
    """
    if not issubclass(fitness, WindowFitness):
        raise UserError(f"racing needs losses per window, which fitness {name!r} does not give; leave --racing out")
    if strategy.n_kept is None:
        raise UserError(
            f"racing estimates the scores of dropped candidates, but {type(strategy).__name__} needs exact scores; "
            "leave --racing out"
        )
