"""Base class of search strategies, which propose sub-networks and receive their scores but never see a model."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from litgpt_whittle.ranking.order import Order
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet

_TRIES = 20
"""Maximum number of inadmissible proposals in a row before random candidates are drawn instead"""

_RANDOM_TRIES = 500
"""Number of inadmissible random candidates in a row after which the space counts as exhausted"""


class Scored(NamedTuple):
    """A sub-network with its score and other measures."""

    subnet: SubNet
    score: float
    """Lower is better; infinite if the evaluation failed"""
    measures: Mapping[str, float]
    """Other measures by name, such as `n_params`"""


class Strategy(ABC):
    """Search strategy, which proposes sub-networks of a space, guided by the scores of earlier sub-networks.

    A subclass takes its settings as keyword arguments of `__init__` (they become flags of `litgpt search`) and
    implements `propose`. Its state must depend only on the seed and the reported scores, so that replaying a journal
    restores it: use no random generator other than the argument of `propose`.

        strategy.start(space, seed=42)
        for subnet in strategy.ask(8):
            strategy.tell(subnet, score(subnet))
    """

    space: Space
    objectives: tuple[str, ...] = ("score",)
    """Names of the objectives to minimise: the score, and measures that must be reported with it"""
    needs_measurements: bool = False
    """True if the strategy needs scores of other sub-networks (`measurements`) before the search"""
    n_kept: int | None = 1
    """Number of best candidates that the search continues from, and that therefore need exact scores; None if all
    candidates need them"""

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        self.space, self.seed = space, seed
        self.history: list[Scored] = []
        self.exhausted = False
        self._asked: set[SubNet] = set()

    @abstractmethod
    def propose(self, rng: np.random.Generator) -> SubNet:
        """Propose a sub-network of `self.space`.

        Called again if the proposal is a duplicate or outside the space's limits.

        Args:
            rng: The only source of randomness; a new generator for every candidate.
        """

    def expects(self, subnet: SubNet) -> dict[str, float]:
        """Return predictions for a candidate without a score, by name; they are recorded with its measured scores."""
        return {}

    def measurements(self, order: Order | None = None) -> dict[str, SubNet]:
        """Return the sub-networks to score before the search, by name; none by default.

        These sub-networks are not candidates and need not lie in the bin. If several bins are searched together, the
        measurements of the first bin serve all bins, so their names must not depend on the bin.

        Args:
            order: The teacher's units by importance, if the space does not prescribe the kept units.

        Raises:
            UserError: If the strategy cannot search this space.
        """
        return {}

    def take_measurements(self, measured: Mapping[str, Scored]) -> None:  # noqa: B027
        """Learn from the scores of all `measurements`, by name."""

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `__init__` that are stored as attributes of the same name."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    @property
    def ready(self) -> int:
        """Number of further candidates that can be proposed before pending scores are reported."""
        return 2**31

    @property
    def n_asked(self) -> int:
        """Number of candidates that were proposed or reported."""
        return len(self._asked)

    @property
    def best(self) -> Scored | None:
        """Best sub-network so far, the earliest in a tie; None if all have failed so far."""
        best = min(self.history, key=lambda scored: scored.score, default=None)
        return None if best is None or math.isinf(best.score) else best

    def ask(self, n: int = 1) -> list[SubNet]:
        """Return up to n candidates without duplicates.

        Returns fewer if further proposals depend on pending scores, or if the space is `exhausted`. The sequence of
        candidates does not depend on the batch sizes, as long as scores are reported in the order of the proposals.
        """
        candidates: list[SubNet] = []
        while len(candidates) < n and self.ready > 0 and not self.exhausted:
            candidate = self._propose_new()
            if candidate is None:
                self.exhausted = True
            else:
                self._asked.add(candidate)
                candidates.append(candidate)
        return candidates

    def tell(self, subnet: SubNet, score: float, measures: Mapping[str, float] | None = None) -> None:
        """Report the score of a candidate, which need not be a proposal of this strategy.

        Candidates from elsewhere, such as the simple starts of a search, are treated like proposals of the strategy: it
        learns from them and does not propose them again.

        Args:
            subnet: The candidate.
            score: Lower is better; NaN or infinity if the evaluation failed.
            measures: Other measures by name, including all `objectives` other than the score.
        """
        self._asked.add(subnet)
        self.history.append(Scored(subnet, score if math.isfinite(score) else math.inf, dict(measures or {})))

    def _propose_new(self) -> SubNet | None:
        rng = np.random.default_rng((self.seed, self.n_asked))
        for i in range(_TRIES + _RANDOM_TRIES):
            candidate = self.propose(rng) if i < _TRIES else self.space.sample(rng)
            if candidate not in self._asked and self.space.admits(candidate):
                return candidate
        return None
