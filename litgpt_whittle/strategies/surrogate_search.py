"""Any strategy with a surrogate in front of it, so that fewer candidates need be evaluated.

The two uses of *Transferrable surrogates in expressive NAS spaces* (2025): candidates that are predicted to be bad are
never evaluated, or the search itself runs on predictions. Both keep to the contract of a strategy.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from litgpt.config import Config

from litgpt_whittle import registry
from litgpt_whittle.errors import UserError
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.searching.args import SurrogateArgs, check_positive
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored, Strategy
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.surrogates.surrogate import Examples, Surrogate

_LEAST_GROWTH = 10
"""Evaluations between two fits of a filter at least"""

_AT_A_TIME = 100
"""Candidates of a search on predictions that are predicted at a time, as far as its strategy allows"""


def with_surrogate(
    strategy: Strategy, args: SurrogateArgs, teacher: Config, ranking: Ranking | None = None, seed: int = 42
) -> tuple[Strategy, dict[str, Any]]:
    """Puts a surrogate in front of a strategy, where one is asked for.

    Args:
        strategy: The strategy.
        args: Which surrogate, and what for.
        teacher: Whose sub-networks are searched.
        ranking: The teacher's ranking, if the search goes by one.
        seed: The search's seed.

    Returns:
        The strategy with the surrogate, and what the search depends on by it: nothing, where none is asked for.

    Raises:
        UserError: If there is no such surrogate, or nothing to learn from where there should be.
    """
    if args.mode == "none":
        return strategy, {}
    if strategy.needs_measurements:
        raise UserError(
            f"strategy {type(strategy).__name__} predicts by its own measurements; leave surrogate.mode "
            f"{args.mode} out or choose another strategy"
        )
    make = partial(registry.lookup("litgpt_whittle.surrogates", args.kind), args)
    examples = None if args.path is None else Examples.read(args.path)
    ranking = ranking if args.importance is None else Ranking.load(args.importance, teacher)
    surrogate = Surrogate(make, teacher, ranking, examples, seed)
    if examples is not None:
        print(
            f"A surrogate learnt from {len(examples)} candidates of {args.path}: "
            f"Kendall's τ {surrogate.examples_tau():.2f} on held-out ones"
        )
    depends_on = asdict(args) | {
        "path": None if examples is None else examples.fingerprint,
        "importance": None if ranking is None else ranking.fingerprint,
    }
    if args.mode == "filter":
        return Filter(strategy, surrogate, args.n_initial, args.n_proposals, args.refit, args.optimism), depends_on
    return OnPredictions(strategy, surrogate, args.n_initial, args.n_inner, args.n_evaluated, args.optimism), depends_on


class SurrogateSearch(Generations):
    """A strategy with a surrogate: the surrogate is fitted between generations, and stays the same within them.

    Before it can predict, this is the strategy itself.

    Args:
        strategy: The strategy.
        surrogate: What predicts, fitted or not.
        n_initial: Evaluations before the surrogate is fitted first.
        optimism: How many standard deviations better than expected candidates are taken to be.
    """

    def __init__(self, strategy: Strategy, surrogate: Surrogate, n_initial: int, optimism: float) -> None:
        check_positive("surrogate", n_initial=n_initial)
        self.strategy, self.surrogate, self.n_initial, self.optimism = strategy, surrogate, n_initial, optimism
        self.objectives, self.n_kept = strategy.objectives, strategy.n_kept

    def start(self, space: Space, seed: int) -> None:
        """Begins a search, forgetting any earlier one."""
        # what was given stays as it is, so that it can be given to another search too
        self.inner, self.predictor = copy.deepcopy(self.strategy), self.surrogate.anew()
        self._is_stale = False
        super().start(space, seed)
        self.inner.start(space, seed)
        self.inner._asked = self._asked  # its candidates are those that are asked for here

    def select(self, generation: list[Scored]) -> None:
        """There is more to learn from; done when it is needed next."""
        self._is_stale = True

    def propose(self, rng: np.random.Generator) -> SubNet:
        """What the surrogate prefers; what the strategy proposes while there is no surrogate."""
        self.fit()
        return self.prefer(rng) if self.predictor.is_fitted else self.inner.propose(rng)

    @abstractmethod
    def prefer(self, rng: np.random.Generator) -> SubNet:
        """A candidate that is predicted to be good."""

    def fit(self) -> None:
        """Fits the surrogate on all that was told, unless it is already."""
        if self._is_stale:
            self.predictor.fit([scored.subnet for scored in self.told], [scored.score for scored in self.told])
            self._is_stale = False

    def save(self, folder: Path) -> None:
        """Writes the surrogate, fitted on all that was told, if it is of a kind that is worth it."""
        self.fit()
        if self.predictor.is_fitted:
            self.predictor.save(folder)

    def expects(self, subnet: SubNet) -> dict[str, float]:
        """The predicted score, where there is a prediction."""
        if not self.predictor.is_fitted:
            return {}
        return {"predicted": float(self.predictor.predict([subnet])[0])}


class Filter(SurrogateSearch):
    """The strategy proposes several candidates for each one that is evaluated: the one with the best prediction.

    The strategy is told the evaluated ones alone. A strategy of several objectives is filtered by the score.

    Args:
        strategy: The strategy.
        surrogate: What predicts.
        n_initial: Evaluations before the surrogate is fitted first.
        n_proposals: Candidates proposed for each one evaluated.
        refit: The share by which the evaluations grow until the surrogate is fitted anew.
        optimism: How many standard deviations better than expected candidates are taken to be.
    """

    def __init__(
        self,
        strategy: Strategy,
        surrogate: Surrogate,
        n_initial: int = 20,
        n_proposals: int = 30,
        refit: float = 0.1,
        optimism: float = 1.0,
    ) -> None:
        super().__init__(strategy, surrogate, n_initial, optimism)
        check_positive("surrogate", n_proposals=n_proposals)
        self.n_proposals, self.refit = n_proposals, refit

    @property
    def generation_size(self) -> int:
        """A number of evaluations that grows with how many there are, so that fitting does not take over."""
        return max(math.ceil(self.refit * len(self.told)), _LEAST_GROWTH) if self.told else self.n_initial

    @property
    def ready(self) -> int:
        """What is left until the surrogate is fitted or the strategy wants to be told."""
        return min(super().ready, self.inner.ready)

    def prefer(self, rng: np.random.Generator) -> SubNet:
        """The best one of several proposals."""
        proposals = list(dict.fromkeys(self.inner.propose(rng) for _ in range(self.n_proposals)))
        new = [subnet for subnet in proposals if subnet not in self._asked and self.space.admits(subnet)]
        if not new:
            return proposals[0]
        return new[int(self.predictor.predict(new, self.optimism).argmin())]

    def tell(self, subnet: SubNet, score: float, measures: Mapping[str, float] | None = None) -> None:
        """Takes the score of a candidate, for the strategy too."""
        self.inner.tell(subnet, score, measures)
        super().tell(subnet, score, measures)


class OnPredictions(SurrogateSearch):
    """The strategy searches on predictions, the best few candidates are evaluated and learnt from, and so on.

    Args:
        strategy: The strategy, which begins anew each time.
        surrogate: What predicts.
        n_initial: Evaluations before the surrogate is fitted first; what the strategy proposes with nothing told.
        n_inner: Predictions per search.
        n_evaluated: How many of the best are then evaluated.
        optimism: How many standard deviations better than expected candidates are taken to be.

    Raises:
        UserError: If the strategy minimises something that cannot be told of predicted candidates.
    """

    def __init__(
        self,
        strategy: Strategy,
        surrogate: Surrogate,
        n_initial: int = 20,
        n_inner: int = 500,
        n_evaluated: int = 10,
        optimism: float = 1.0,
    ) -> None:
        super().__init__(strategy, surrogate, n_initial, optimism)
        check_positive("surrogate", n_inner=n_inner, n_evaluated=n_evaluated)
        self.n_inner, self.n_evaluated = n_inner, n_evaluated
        if unknown := [name for name in strategy.objectives if name not in ("score", "n_params")]:
            raise UserError(
                f"surrogate.mode objective knows score and n_params alone, the strategy minimises {unknown[0]}; "
                "use surrogate.mode filter"
            )

    def start(self, space: Space, seed: int) -> None:
        """Begins a search, forgetting any earlier one."""
        self._queue: list[SubNet] = []
        self._queue_for = -1
        super().start(space, seed)

    @property
    def generation_size(self) -> int:
        """The first ones, then what each search on predictions brings."""
        return self.n_evaluated if self.told or self.predictor.is_fitted else self.n_initial

    @property
    def ready(self) -> int:
        """What is left of this generation, and of the strategy's own, while candidates are its own."""
        return super().ready if self.predictor.is_fitted else min(super().ready, self.inner.ready)

    def prefer(self, rng: np.random.Generator) -> SubNet:
        """The next one of the best of a search on predictions; a random one when it brought too few."""
        if self._queue_for != self._begins:
            self._queue, self._queue_for = self._search(int(rng.integers(2**31))), self._begins
        return next((subnet for subnet in self._queue if subnet not in self._asked), None) or self.space.sample(rng)

    def _search(self, seed: int) -> list[SubNet]:
        """The best sub-networks, by prediction, that a search finds and that were not asked for yet."""
        strategy = copy.deepcopy(self.strategy)
        strategy.start(self.space, seed)
        while len(strategy.told) < self.n_inner:
            candidates = strategy.ask(min(self.n_inner - len(strategy.told), _AT_A_TIME))
            if not candidates:
                break
            for subnet, score in zip(candidates, self.predictor.predict(candidates, self.optimism).tolist()):
                strategy.tell(subnet, score, {"n_params": float(self.space.n_params(subnet))})
        ranked = sorted(strategy.told, key=lambda scored: scored.score)
        return [scored.subnet for scored in ranked if scored.subnet not in self._asked][: self.n_evaluated]

    def tell(self, subnet: SubNet, score: float, measures: Mapping[str, float] | None = None) -> None:
        """Takes the score of a candidate; the strategy is told those that were its own."""
        if not self.predictor.is_fitted:
            self.inner.tell(subnet, score, measures)
        super().tell(subnet, score, measures)
