"""Main loop of a search: propose, evaluate and record candidates, and report their scores to the strategies.

The first candidates of a search are its simple starts, if any; the strategies propose the others. All processes run the
same loop and make the same decisions. Scoring is distributed over them; rank 0 writes the journal.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from tqdm import tqdm

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import readable_size
from litgpt_whittle.fitness.base import Fitness
from litgpt_whittle.journal import Evaluation, Outcome
from litgpt_whittle.processes import (
    free_memory,
    is_out_of_memory,
    n_sharing,
    own_device,
    parallel_map,
    rank,
    release_memory,
)
from litgpt_whittle.searching.objectives import Measures
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.spaces.starts import Start
from litgpt_whittle.strategies import Strategy
from litgpt_whittle.subnet import SubNet

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROUND = 32
"""Maximum number of proposals per batch, for strategies that never wait for scores"""

SaveBest = Callable[["Search", Evaluation], None]


class Record(Protocol):
    """Destination of evaluations: a `Journal`, or its in-memory copy if another process writes it."""

    evaluations: list[Evaluation]

    def append(self, evaluation: Evaluation) -> None: ...


@dataclass
class Search:
    """The search of one bin."""

    space: Space
    strategy: Strategy
    score: str
    """Name of the score to minimise"""
    measures: Measures = field(default_factory=dict)
    """Additional measures of a candidate, recorded with its scores"""
    starts: Sequence[Start] = ()
    """Candidates to evaluate before the strategy's first proposal; their scores are reported to it"""
    best: Evaluation | None = None
    n_reported: int = 0
    """Number of evaluations reported to the strategy"""

    @classmethod
    def begin(cls, space: Space, strategy: Strategy, score: str, seed: int, measures: Measures | None = None) -> Search:
        """Start a search with its own copy of the strategy, independent of other bins."""
        strategy = copy.deepcopy(strategy)
        strategy.start(space, seed)
        return cls(space, strategy, score, dict(measures or {}))

    def ask(self, iterations: int) -> list[SubNet]:
        """Return the next candidates, up to `iterations` evaluations in total; empty when the search is finished."""
        if starts := self.starts[self.n_reported : iterations]:
            return [start.subnet for start in starts]
        n = min(ROUND if self.strategy.ready >= 2**31 else self.strategy.ready, iterations - self.n_reported)
        return self.strategy.ask(n) if n > 0 else []

    @property
    def origin(self) -> str | None:
        """Name of the simple start that is recorded next; None if the next candidate is the strategy's proposal."""
        return self.starts[self.n_reported].origin if self.n_reported < len(self.starts) else None

    def tell(self, candidate: SubNet, evaluation: Evaluation) -> None:
        """Report an evaluation to the strategy."""
        self.strategy.tell(candidate, evaluation.score(self.score), evaluation.measures)
        self.n_reported += 1

    def update_best(self, evaluation: Evaluation) -> bool:
        """Replace the best evaluation if the new score is lower; return whether it was replaced."""
        score = evaluation.score(self.score)
        better = not evaluation.dropped and score < (math.inf if self.best is None else self.best.score(self.score))
        if better:
            self.best = evaluation
        return better

    def costs(self, candidate: SubNet) -> tuple[dict[str, float], str | None]:
        """Return a candidate's additional measures, and an error message if one of them is outside its limit."""
        costs = {name: measure(candidate) for name, measure in self.measures.items()}
        return costs, self.space.limits.excess(costs)

    @property
    def standing(self) -> str:
        """The best score so far, as a text for the progress bar."""
        return f"best {self.best.score(self.score):.4g}" if self.best is not None else "none yet"


class Loop:
    """Loop over proposals and evaluations, alternating between bins; recorded evaluations are replayed first.

    Args:
        searches: One per bin.
        record: Record of all evaluations; existing ones are reported to the strategies, and not repeated.
        fitness: Scores a sub-network.
        iterations: Evaluations per bin.
        seed: Seed of the search, for the record.
        save_best: Called with every new best of a bin.
        parallel_map: Distributes work over processes.
    """

    def __init__(
        self,
        searches: list[Search],
        record: Record,
        fitness: Fitness,
        iterations: int,
        seed: int,
        save_best: SaveBest,
        parallel_map: Callable = parallel_map,
    ) -> None:
        self.searches, self.record, self.fitness = searches, record, fitness
        self.iterations, self.seed, self.save_best, self.parallel_map = iterations, seed, save_best, parallel_map

    def run(self) -> None:
        """Run until every bin has `iterations` evaluations or is exhausted.

        Raises:
            UserError: If the journal has more evaluations of a bin, or its candidates differ from the proposals of this
                search.
        """
        self.known: dict[str, list[Evaluation]] = {str(search.space.bin): [] for search in self.searches}
        for evaluation in self.record.evaluations:
            self.known.setdefault(evaluation.bin, []).append(evaluation)
        n_known = max(map(len, self.known.values()))
        if n_known > self.iterations:
            raise UserError(
                f"iterations must be at least {n_known}, the journal's evaluations of a bin, got {self.iterations}; "
                "raise it, or begin in another out_dir"
            )
        total = max(self.iterations * len(self.searches), len(self.record.evaluations))
        with tqdm(total=total, unit="candidate", dynamic_ncols=True, disable=rank() > 0) as self.bar:
            while rounds := [(search, asked) for search in self.searches if (asked := search.ask(self.iterations))]:
                for search, candidates in rounds:
                    self._round(search, candidates)
        for search in self.searches if rank() == 0 else ():
            if search.strategy.exhausted:
                logger.info(f"The bin {search.space.bin} has no further sub-networks: {search.n_reported} evaluated")

    def _round(self, search: Search, candidates: list[SubNet]) -> None:
        """Evaluate one batch of proposals, replaying those in the journal."""
        known = self.known_of(search, len(candidates))
        for candidate, evaluation in zip(candidates, known):
            check_replayed(evaluation, search, candidate)
            self._finish(search, candidate, evaluation)
        if left := candidates[len(known) :]:
            self.evaluate(search, left)

    def known_of(self, search: Search, n: int) -> list[Evaluation]:
        """Return the recorded evaluations of a bin's next n candidates.

        Looked up by bin, because bins interleave differently if an earlier run had fewer iterations.
        """
        return self.known[str(search.space.bin)][search.n_reported : search.n_reported + n]

    def evaluate(self, search: Search, candidates: list[SubNet]) -> None:
        """Score candidates, each on all validation batches."""
        outcomes = self.parallel_map(lambda candidate: score(self.fitness, candidate, search), candidates)
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
        if search.update_best(evaluation):
            self.save_best(search, evaluation)
        self.bar.update()
        self.bar.set_postfix_str(", ".join(search.standing for search in self.searches), refresh=False)


def score(fitness: Fitness, candidate: SubNet, search: Search | None = None) -> Outcome:
    """Score a candidate of a search, or any sub-network if `search` is None.

    A candidate fails if it is outside a limit, or its loss is not finite.

    Raises:
        UserError: If memory runs out even with half as many windows per forward pass.
    """
    started = time.perf_counter()
    costs, error = ({}, None) if search is None else search.costs(candidate)
    expects = search.strategy.expects if search is not None else lambda _: {}
    found: dict[str, float] = {}
    if error is None:
        found = within_memory(fitness, lambda: {**fitness(candidate), **expects(candidate)})
    scores, error = finite({**found, **costs}, error)
    return Outcome(
        scores=scores,
        batches=len(fitness.batches),
        tokens=fitness.n_tokens,
        seconds=round(time.perf_counter() - started, 4),
        error=error,
    )


def within_memory(fitness: Fitness, function: Callable[[], T]) -> T:
    """Return the result of a function that scores a candidate.

    If memory runs out, cached memory is released, and the function is called once more. If the fitness supports it,
    the second call has half as many windows per forward pass. A failure is not recorded as a candidate's score, because
    it depends on the device, and would bias the search towards small candidates.

    Raises:
        UserError: If memory runs out again.
    """
    found = _unless_out_of_memory(function)
    # processes that share a teacher wait for one another
    if found is None and not fitness.is_sharded:
        release_memory()
        with fitness.halved():
            found = _unless_out_of_memory(function)
    if found is None:
        device = own_device()
        raise UserError(
            "each candidate must fit into memory, but one did not even at half of train.micro_batch_size, with "
            f"{readable_size(free_memory(device, n_sharing(device)))} free; search in another out_dir with a smaller "
            "train.micro_batch_size, or continue with --resume true where more memory is free"
        )
    return found[0]


def _unless_out_of_memory(function: Callable[[], T]) -> tuple[T] | None:
    """Return a function's result as a tuple; None if memory ran out."""
    try:
        return (function(),)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None  # outside of the handler, whose traceback would keep tensors alive


def finite(scores: Mapping[str, float], error: str | None) -> tuple[dict[str, float | None], str | None]:
    """Replace scores that are not finite by None, and return them with the error, if any."""
    if error is None and not all(math.isfinite(score) for score in scores.values()):
        error = "its loss is not finite"
    return {name: score if math.isfinite(score) else None for name, score in scores.items()}, error


def check_replayed(evaluation: Evaluation, search: Search, candidate: SubNet) -> None:
    """Raise UserError if a recorded candidate differs from the proposal: another version wrote the journal."""
    if evaluation.bin != str(search.space.bin) or evaluation.subnet != candidate.to_dict():
        raise UserError(
            f"evaluation {evaluation.index} of the journal is not the candidate that this search proposes; it was "
            "written by another version, so begin in another out_dir"
        )
