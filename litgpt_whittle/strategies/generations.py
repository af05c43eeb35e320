"""Base class of strategies with generations: each starts when all scores of the previous generation are reported."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored, Strategy
from litgpt_whittle.subnet import SubNet


class Generations(Strategy):
    """Strategy that proposes a generation, waits for its scores, learns from them, and proposes the next one.

    The candidates of a generation do not depend on each other's scores, so they can be scored in parallel. A subclass
    must initialise its own state before calling `start` of this class.
    """

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        super().start(space, seed)
        self._begins, self._ends = 0, self.generation_size

    @property
    @abstractmethod
    def generation_size(self) -> int:
        """Number of candidates in the next generation."""

    @abstractmethod
    def select(self, generation: list[Scored]) -> None:
        """Learn from a complete generation, in the order in which its scores were reported."""

    @property
    def ready(self) -> int:
        """Number of candidates of this generation still to propose; the next generation needs all of its scores."""
        return self._ends - self.n_asked

    def tell(self, subnet: SubNet, score: float, measures: Mapping[str, float] | None = None) -> None:
        """Report the score of a candidate; the last score of a generation starts the next generation."""
        super().tell(subnet, score, measures)
        if len(self.history) == self._ends:
            self.select(self.history[self._begins :])
            self._begins, self._ends = self._ends, self._ends + self.generation_size
