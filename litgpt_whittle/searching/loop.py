"""The loop of a search: candidates are proposed, evaluated, recorded, and their scores reported to the strategies.

The first candidates of a search are its simple starts, if it has any; the strategies propose the others.
All processes run the same loop and come to the same decisions. They share the scoring, and the first one writes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tqdm import tqdm

from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness.perplexity import Fitness
from litgpt_whittle.processes import rank, spread
from litgpt_whittle.searching.journal import Evaluation
from litgpt_whittle.searching.objectives import Measures
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.spaces.starts import Start
from litgpt_whittle.strategies import Strategy
from litgpt_whittle.subnet import SubNet

ROUND = 32
"""At most so many candidates are asked for at a time, by strategies that never wait for scores"""

SaveBest = Callable[["Search", Evaluation], None]


class Record(Protocol):
    """Where evaluations go: a `Journal`, or a list of them where another process writes it."""

    evaluations: list[Evaluation]

    def append(self, evaluation: Evaluation) -> None: ...


@dataclass
class Search:
    """The search of one bin."""

    space: Space
    strategy: Strategy
    score: str
    """Which of a candidate's scores counts"""
    measures: Measures = field(default_factory=dict)
    """What else to measure of a candidate; journalled among its scores"""
    starts: Sequence[Start] = ()
    """Candidates to evaluate before the strategy is asked, reported to it like its own"""
    best: Evaluation | None = None
    n_told: int = 0

    @classmethod
    def begin(cls, space: Space, strategy: Strategy, score: str, seed: int, measures: Measures | None = None) -> Search:
        """A search of its own, whatever other bins are searched beside it."""
        strategy = copy.deepcopy(strategy)
        strategy.start(space, seed)
        return cls(space, strategy, score, dict(measures or {}))

    def ask(self, iterations: int) -> list[SubNet]:
        """What to evaluate next, so that all of it comes to so many; nothing when there is nothing left."""
        if starts := self.starts[self.n_told : iterations]:
            return [start.subnet for start in starts]
        n = min(ROUND if self.strategy.ready >= 2**31 else self.strategy.ready, iterations - self.n_told)
        return self.strategy.ask(n) if n > 0 else []

    @property
    def origin(self) -> str | None:
        """The simple idea that the next candidate to record was built by; None for one of the strategy's."""
        return self.starts[self.n_told].origin if self.n_told < len(self.starts) else None

    def tell(self, candidate: SubNet, evaluation: Evaluation) -> None:
        """Takes an evaluation."""
        self.strategy.tell(candidate, evaluation.score(self.score), evaluation.measures)
        self.n_told += 1

    def is_better(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation is the best so far, which it then is to later ones."""
        score = evaluation.score(self.score)
        better = not evaluation.dropped and score < (math.inf if self.best is None else self.best.score(self.score))
        if better:
            self.best = evaluation
        return better

    def costs(self, candidate: SubNet) -> tuple[dict[str, float], str | None]:
        """What a candidate costs, and why it fails if that is beyond a limit."""
        costs = {name: measure(candidate) for name, measure in self.measures.items()}
        return costs, self.space.limits.excess(costs)

    @property
    def standing(self) -> str:
        """The best so far, for the progress bar."""
        return f"best {self.best.score(self.score):.4g}" if self.best is not None else "none yet"


class Loop:
    """Evaluates candidates, the bins in turn, first from the journal as far as it goes.

    Args:
        searches: One per bin.
        record: Gets every evaluation as it ends; those that it has are told to the strategies instead of repeated.
        fitness: Scores a sub-network.
        iterations: Evaluations per bin.
        seed: For the record.
        save_best: Called with every new best of a bin.
        spread: Distributes work over processes.
    """

    def __init__(
        self,
        searches: list[Search],
        record: Record,
        fitness: Fitness,
        iterations: int,
        seed: int,
        save_best: SaveBest,
        spread: Callable = spread,
    ) -> None:
        self.searches, self.record, self.fitness = searches, record, fitness
        self.iterations, self.seed, self.save_best, self.spread = iterations, seed, save_best, spread

    def run(self) -> None:
        """Runs until every bin has its evaluations, or no further sub-networks.

        Raises:
            UserError: If the journal has more of them, or others than this search would have tried.
        """
        self.known = {str(search.space.bin): [] for search in self.searches}
        for evaluation in self.record.evaluations:
            self.known.setdefault(evaluation.bin, []).append(evaluation)
        n_known = max(map(len, self.known.values()))
        if n_known > self.iterations:
            raise UserError(
                f"iterations must be at least {n_known}, which the journal has, got {self.iterations}; raise it, or "
                "begin in another out_dir"
            )
        total = max(self.iterations * len(self.searches), len(self.record.evaluations))
        with tqdm(total=total, unit="candidate", dynamic_ncols=True, disable=rank() > 0) as self.bar:
            while rounds := [(search, asked) for search in self.searches if (asked := search.ask(self.iterations))]:
                for search, candidates in rounds:
                    self._round(search, candidates)
        for search in self.searches if rank() == 0 else ():
            if search.strategy.exhausted:
                print(f"The bin {search.space.bin} has no further sub-networks: {search.n_told} evaluated")

    def _round(self, search: Search, candidates: list[SubNet]) -> None:
        """Evaluates candidates that were asked for together."""
        known = self.known_of(search, len(candidates))
        for candidate, evaluation in zip(candidates, known):
            check_replayed(evaluation, search, candidate)
            self._finish(search, candidate, evaluation)
        if left := candidates[len(known) :]:
            self.evaluate(search, left)

    def known_of(self, search: Search, n: int) -> list[Evaluation]:
        """What the record had of a bin's next n candidates.

        By bin, since their turns are others where an earlier run was to have fewer iterations.
        """
        return self.known[str(search.space.bin)][search.n_told : search.n_told + n]

    def evaluate(self, search: Search, candidates: list[SubNet]) -> None:
        """Scores candidates, each on all of the data."""
        outcomes = self.spread(lambda candidate: score(self.fitness, candidate, search), candidates)
        for candidate, outcome in zip(candidates, outcomes):
            self._append(search, candidate, outcome)

    def _append(self, search: Search, candidate: SubNet, outcome: Outcome) -> None:
        evaluation = Evaluation(
            index=len(self.record.evaluations),
            bin=str(search.space.bin),
            subnet=candidate.to_dict(),
            n_params=search.space.n_params(candidate),
            seed=self.seed,
            origin=search.origin,
            **vars(outcome),
        )
        self.record.append(evaluation)
        self._finish(search, candidate, evaluation)

    def _finish(self, search: Search, candidate: SubNet, evaluation: Evaluation) -> None:
        search.tell(candidate, evaluation)
        if search.is_better(evaluation):
            self.save_best(search, evaluation)
        self.bar.update()
        self.bar.set_postfix_str(", ".join(search.standing for search in self.searches), refresh=False)


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate: the part of an `Evaluation` that its scoring gives."""

    scores: Mapping[str, float | None]
    batches: int
    tokens: int
    seconds: float
    error: str | None = None
    dropped: bool = False
    losses: list[float] | None = None


def score(fitness: Fitness, candidate: SubNet, search: Search | None = None) -> Outcome:
    """Score a candidate of a search, or another sub-network.

    One counts as failed that is beyond a limit, whose loss is not finite, or that runs out of memory.
    """
    started = time.perf_counter()
    costs, error = ({}, None) if search is None else search.costs(candidate)
    expects = search.strategy.expects if search is not None else lambda _: {}
    scores = {}
    if error is None:
        scores, error = attempt(lambda: {**fitness(candidate), **expects(candidate)})
    scores, error = finite({**(scores or {}), **costs}, error)
    return Outcome(scores, len(fitness.batches), fitness.n_tokens, round(time.perf_counter() - started, 4), error)


def attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a function gives, or why it could not: memory ran out."""
    try:
        return function(), None
    except (torch.OutOfMemoryError, MemoryError):
        return None, "out of memory"
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what PyTorch says where the CPU's memory runs out
            raise
        return None, "out of memory"


def finite(scores: Mapping[str, float], error: str | None) -> tuple[dict[str, float | None], str | None]:
    """Scores with None in the place of what is not finite, which is an error."""
    if error is None and not all(math.isfinite(score) for score in scores.values()):
        error = "its loss is not finite"
    return {name: score if math.isfinite(score) else None for name, score in scores.items()}, error


def check_replayed(evaluation: Evaluation, search: Search, candidate: SubNet) -> None:
    """Refuses a journal that another version of the program wrote."""
    if evaluation.bin != str(search.space.bin) or evaluation.subnet != candidate.to_dict():
        raise UserError(
            f"evaluation {evaluation.index} of the journal is not what this search would have tried; it was written by "
            "another version, so begin in another out_dir"
        )
