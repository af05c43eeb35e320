"""What every search strategy is: asked for sub-networks, told their scores, and never shown a model."""

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
"""How often a strategy may propose what cannot be asked for, before a random candidate takes its place"""

_RANDOM_TRIES = 500
"""How many random candidates in a row must be old ones or beyond a limit for the space to count as exhausted"""


class Scored(NamedTuple):
    """A sub-network, its score and what else is known of it."""

    subnet: SubNet
    score: float
    """The lower the better; infinite where the evaluation failed"""
    measures: Mapping[str, float]
    """Whatever else was measured, by name, such as `n_params`"""


class Strategy(ABC):
    """Proposes sub-networks of a space, guided by the scores of earlier ones.

    A subclass takes its settings as keyword arguments of `__init__` (they become flags of `litgpt search`) and says
    in `propose` what to try next. Its state must follow from the seed and what it was told alone, so that a journal
    replayed brings it back: draw from the generator that `propose` is given, from nothing else.

        strategy.start(space, seed=42)
        for subnet in strategy.ask(8):
            strategy.tell(subnet, score(subnet))
    """

    space: Space
    objectives: tuple[str, ...] = ("score",)
    """What it minimises: the score, and measures that it wants to be told with it, by name"""
    needs_measurements: bool = False
    """Scores of other sub-networks (`measurements`) come before the search"""
    n_kept: int | None = 1
    """How many of the best it goes on from, the only ones that must be told apart exactly; None for all of them"""

    def start(self, space: Space, seed: int) -> None:
        """Begins a search, forgetting any earlier one."""
        self.space, self.seed = space, seed
        self.told: list[Scored] = []
        self.exhausted = False
        self._asked: set[SubNet] = set()

    @abstractmethod
    def propose(self, rng: np.random.Generator) -> SubNet:
        """One sub-network of `self.space`.

        One that was asked before or is outside of the space's limits is turned down and another one proposed.

        Args:
            rng: Where all randomness comes from; a new one for every candidate.
        """

    def expects(self, subnet: SubNet) -> dict[str, float]:
        """What it expects of a candidate that is not told yet, by name; journalled beside what is then measured."""
        return {}

    def measurements(self, order: Order | None = None) -> dict[str, SubNet]:
        """Return sub-networks to score before the search, by names; none by default.

        They are no candidates and need not lie in the bin. Of bins that are searched together, those of the first one
        serve all: they must have the same names.

        Args:
            order: The teacher's units by importance, where a space does not prescribe which are kept.

        Raises:
            UserError: If the strategy cannot search this space.
        """
        return {}

    def take_measurements(self, measured: Mapping[str, Scored]) -> None:
        """Learn from the scores of all `measurements`, by their names."""

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that it was made with, where they are kept under their names."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    @property
    def ready(self) -> int:
        """How many more candidates may be asked for before all asked ones are told."""
        return 2**31

    @property
    def n_asked(self) -> int:
        """The number of candidates that were handed out, or reported without that."""
        return len(self._asked)

    @property
    def best(self) -> Scored | None:
        """The best sub-network so far, the earlier one of equals; None while all have failed."""
        best = min(self.told, key=lambda scored: scored.score, default=None)
        return None if best is None or math.isinf(best.score) else best

    def ask(self, n: int = 1) -> list[SubNet]:
        """Up to n candidates, each a new one.

        Fewer where the rest depends on scores still to come, and where the space is `exhausted`. However many are
        asked for at a time, the candidates are the same as long as they are told in the order in which they came.
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
        """Record the score of a candidate, which need not be one that was asked for.

        Others, such as the simple starts of a search, count like candidates of the strategy's own: it learns from them
        and does not propose them again.

        Args:
            subnet: The candidate.
            score: The lower the better; NaN or infinity for one that could not be scored.
            measures: What else was measured, by name; at least what `objectives` names beside the score.
        """
        self._asked.add(subnet)
        self.told.append(Scored(subnet, score if math.isfinite(score) else math.inf, dict(measures or {})))

    def _propose_new(self) -> SubNet | None:
        rng = np.random.default_rng((self.seed, self.n_asked))
        for i in range(_TRIES + _RANDOM_TRIES):
            candidate = self.propose(rng) if i < _TRIES else self.space.sample(rng)
            if candidate not in self._asked and self.space.admits(candidate):
                return candidate
        return None
