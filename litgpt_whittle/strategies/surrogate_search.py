"""Wrappers that combine any strategy with a surrogate to reduce the number of evaluations.

Both wrappers are from *Transferrable surrogates in expressive NAS spaces* (2025) and implement the interface of a
strategy. `Filter` does not evaluate candidates with bad predictions; `OnPredictions` runs the search on predictions.
"""

from __future__ import annotations

import copy
import logging
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
from litgpt_whittle.setting_checks import check_positive
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored, Strategy
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.surrogates.surrogate import Examples, Surrogate

logger = logging.getLogger(__name__)

_LEAST_GROWTH = 10
"""Minimum number of evaluations between two fits of a filter"""

_AT_A_TIME = 100
"""Maximum number of candidates per prediction batch in a search on predictions"""


def with_surrogate(
    strategy: Strategy, args: SurrogateArgs, teacher: Config, ranking: Ranking | None = None, seed: int = 42
) -> tuple[Strategy, dict[str, Any]]:
    """Combine a strategy with a surrogate if the settings request one.

    Args:
        strategy: The strategy.
        args: Settings of the surrogate.
        teacher: The teacher's config.
        ranking: The teacher's ranking, if the search uses one.
        seed: Seed of the search.

    Returns:
        The strategy, with the surrogate if requested, and the settings of the surrogate that affect the search (empty
        without a surrogate).

    Raises:
        UserError: If the surrogate is unknown, the strategy needs measurements, or the files to learn from are invalid.
    """
    if args.mode == "none":
        return strategy, {}
    if strategy.needs_measurements:
        raise UserError(
            f"strategy {type(strategy).__name__} predicts by its own measurements; remove surrogate.mode "
            f"{args.mode} or choose another strategy"
        )
    make = partial(registry.lookup("litgpt_whittle.surrogates", args.kind), args)
    examples = None if args.path is None else Examples.read(args.path)
    ranking = ranking if args.importance is None else Ranking.load(args.importance, teacher)
    surrogate = Surrogate(make, teacher, ranking, examples, seed)
    if examples is not None:
        logger.info(
            f"A surrogate learnt from {len(examples)} candidates of {args.path}: "
            f"Kendall's τ {surrogate.examples_tau():.2f} on held-out candidates"
        )
    depends_on = asdict(args) | {
        "path": None if examples is None else examples.fingerprint,
        "importance": None if ranking is None else ranking.fingerprint,
    }
    if args.mode == "filter":
        return Filter(strategy, surrogate, args.n_initial, args.n_proposals, args.refit, args.optimism), depends_on
    return OnPredictions(strategy, surrogate, args.n_initial, args.n_inner, args.n_evaluated, args.optimism), depends_on


class SurrogateSearch(Generations):
    """Strategy with a surrogate that is refitted between generations and constant within each generation.

    Until the surrogate can predict, the proposals of the wrapped strategy are used unchanged.

    Args:
        strategy: The strategy.
        surrogate: The surrogate, fitted or not.
        n_initial: Evaluations before the first fit of the surrogate.
        optimism: κ in the lower confidence bound μ − κσ.
    """

    def __init__(self, strategy: Strategy, surrogate: Surrogate, n_initial: int, optimism: float) -> None:
        check_positive("surrogate", n_initial=n_initial)
        self.strategy, self.surrogate, self.n_initial, self.optimism = strategy, surrogate, n_initial, optimism
        self.objectives, self.n_kept = strategy.objectives, strategy.n_kept

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        # copies, so that the arguments can be reused for another search
        self.inner, self.predictor = copy.deepcopy(self.strategy), self.surrogate.unfitted()
        self._is_stale = False
        super().start(space, seed)
        self.inner.start(space, seed)
        self.inner._asked = self._asked  # both share one set of proposed candidates

    def select(self, generation: list[Scored]) -> None:
        """Mark the surrogate as outdated; the next proposal refits it."""
        self._is_stale = True

    def propose(self, rng: np.random.Generator) -> SubNet:
        """Propose a candidate with a good prediction, or the wrapped strategy's proposal before the first fit."""
        self.fit()
        return self.prefer(rng) if self.predictor.is_fitted else self.inner.propose(rng)

    @abstractmethod
    def prefer(self, rng: np.random.Generator) -> SubNet:
        """Return a candidate with a good prediction."""

    def fit(self) -> None:
        """Fit the surrogate to all reported scores, unless it is up to date."""
        if self._is_stale:
            self.predictor.fit([scored.subnet for scored in self.history], [scored.score for scored in self.history])
            self._is_stale = False

    def save(self, folder: Path) -> None:
        """Save the surrogate, fitted to all reported scores, if its regressor supports saving."""
        self.fit()
        if self.predictor.is_fitted:
            self.predictor.save(folder)

    def expects(self, subnet: SubNet) -> dict[str, float]:
        """Return the predicted score, if the surrogate is fitted."""
        if not self.predictor.is_fitted:
            return {}
        return {"predicted": float(self.predictor.predict([subnet])[0])}


class Filter(SurrogateSearch):
    """Strategy whose proposals are filtered: of several proposals, only the one with the best prediction is evaluated.

    Only scores of evaluated candidates are reported to the strategy. If the strategy has several objectives, the filter
    predicts only the score.

    Args:
        strategy: The strategy.
        surrogate: The surrogate.
        n_initial: Evaluations before the first fit of the surrogate.
        n_proposals: Candidates proposed per evaluation.
        refit: Relative growth of the number of evaluations between two fits.
        optimism: κ in the lower confidence bound μ − κσ.
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
        """Number of evaluations between two fits, which grows with their total to limit the cost of fits."""
        return max(math.ceil(self.refit * len(self.history)), _LEAST_GROWTH) if self.history else self.n_initial

    @property
    def ready(self) -> int:
        """Number of candidates until the next fit, or until the strategy needs pending scores."""
        return min(super().ready, self.inner.ready)

    def prefer(self, rng: np.random.Generator) -> SubNet:
        """Return the proposal with the best prediction, out of several."""
        proposals = list(dict.fromkeys(self.inner.propose(rng) for _ in range(self.n_proposals)))
        new = [subnet for subnet in proposals if subnet not in self._asked and self.space.admits(subnet)]
        if not new:
            return proposals[0]
        return new[int(self.predictor.predict(new, self.optimism).argmin())]

    def tell(self, subnet: SubNet, score: float, measures: Mapping[str, float] | None = None) -> None:
        """Report the score of a candidate, also to the wrapped strategy."""
        self.inner.tell(subnet, score, measures)
        super().tell(subnet, score, measures)


class OnPredictions(SurrogateSearch):
    """Strategy that alternates between a search on predictions and evaluations of the best candidates found.

    Args:
        strategy: The strategy, which starts from scratch in each search on predictions.
        surrogate: The surrogate.
        n_initial: Evaluations before the first fit of the surrogate, proposed by the strategy.
        n_inner: Predictions per search on predictions.
        n_evaluated: Candidates to evaluate after each search.
        optimism: κ in the lower confidence bound μ − κσ.

    Raises:
        UserError: If the strategy has objectives other than the score and the number of parameters.
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
                f"surrogate.mode objective supports only score and n_params, but the strategy minimises {unknown[0]}; "
                "use surrogate.mode filter"
            )

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        self._queue: list[SubNet] = []
        self._queue_for = -1
        super().start(space, seed)

    @property
    def generation_size(self) -> int:
        """Number of evaluations before the first fit, then after each search on predictions."""
        return self.n_evaluated if self.history or self.predictor.is_fitted else self.n_initial

    @property
    def ready(self) -> int:
        """Number of candidates still to propose in this generation; before the first fit, at most the
        number that the wrapped strategy can propose."""
        return super().ready if self.predictor.is_fitted else min(super().ready, self.inner.ready)

    def prefer(self, rng: np.random.Generator) -> SubNet:
        """Return the next of the best candidates of a search on predictions; a random candidate if none is left."""
        if self._queue_for != self._begins:
            self._queue, self._queue_for = self._search(int(rng.integers(2**31))), self._begins
        return next((subnet for subnet in self._queue if subnet not in self._asked), None) or self.space.sample(rng)

    def _search(self, seed: int) -> list[SubNet]:
        """Search on predictions and return the best sub-networks that were not proposed before."""
        strategy = copy.deepcopy(self.strategy)
        strategy.start(self.space, seed)
        while len(strategy.history) < self.n_inner:
            candidates = strategy.ask(min(self.n_inner - len(strategy.history), _AT_A_TIME))
            if not candidates:
                break
            for subnet, score in zip(candidates, self.predictor.predict(candidates, self.optimism).tolist()):
                strategy.tell(subnet, score, {"n_params": float(self.space.n_params(subnet))})
        ranked = sorted(strategy.history, key=lambda scored: scored.score)
        return [scored.subnet for scored in ranked if scored.subnet not in self._asked][: self.n_evaluated]

    def tell(self, subnet: SubNet, score: float, measures: Mapping[str, float] | None = None) -> None:
        """Report the score of a candidate; before the first fit, also to the wrapped strategy."""
        if not self.predictor.is_fitted:
            self.inner.tell(subnet, score, measures)
        super().tell(subnet, score, measures)
