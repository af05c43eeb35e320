"""Strategies that go by generations: a new one begins when all candidates of the last one are told."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored, Strategy
from litgpt_whittle.subnet import SubNet


class Generations(Strategy):
    """Proposes a generation, waits for its scores, learns from them, and proposes the next one.

    The candidates of a generation do not depend on each other's scores, so that they can be scored side by side. A
    subclass sets up its own state before it calls `start` of this class.
    """

    def start(self, space: Space, seed: int) -> None:
        """Begins a search, forgetting any earlier one."""
        super().start(space, seed)
        self._begins, self._ends = 0, self.generation_size

    @property
    @abstractmethod
    def generation_size(self) -> int:
        """How many candidates the generation has that begins now."""

    @abstractmethod
    def select(self, generation: list[Scored]) -> None:
        """Learns from a generation, all of it told, in the order in which it was told."""

    @property
    def ready(self) -> int:
        """What is left of this generation; the next one needs all of its scores."""
        return self._ends - self.n_asked

    def tell(self, subnet: SubNet, score: float, measures: Mapping[str, float] | None = None) -> None:
        """Takes the score of a candidate; the last one of a generation begins the next."""
        super().tell(subnet, score, measures)
        if len(self.told) == self._ends:
            self.select(self.told[self._begins :])
            self._begins, self._ends = self._ends, self._ends + self.generation_size
