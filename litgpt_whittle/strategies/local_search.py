"""Hill climbing with restarts, the simplest search that learns from its scores."""

from __future__ import annotations

import math

import numpy as np

from litgpt_whittle.setting_checks import (
    check_positive,
    check_shares,
)
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.subnet import SubNet


class LocalSearch(Generations):
    """Hill climbing: move to a mutation of the current sub-network if it is at least as good, and restart when stuck.

    Args:
        n_starts: Random sub-networks to score before each climb, which starts at the best of them.
        n_neighbours: Mutations per step; more allow more parallel scoring, fewer climb faster.
        patience: Number of neighbours in a row without an improvement before a restart.
        mutation_probability: Probability of a change for each choice (a size, a set of units, the layers); at least one
            choice changes.
    """

    def __init__(
        self, n_starts: int = 10, n_neighbours: int = 1, patience: int = 100, mutation_probability: float = 0.1
    ) -> None:
        check_positive("strategy", n_starts=n_starts, n_neighbours=n_neighbours, patience=patience)
        check_shares("strategy", mutation_probability=mutation_probability)
        self.n_starts = n_starts
        self.n_neighbours = n_neighbours
        self.patience = patience
        self.mutation_probability = mutation_probability

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        self._restart()
        super().start(space, seed)

    def _restart(self) -> None:
        self.at: Scored | None = None
        self.n_in_vain = 0

    @property
    def generation_size(self) -> int:
        """Number of random sub-networks at the start of a climb, number of neighbours in later steps."""
        return self.n_starts if self.at is None else self.n_neighbours

    def select(self, generation: list[Scored]) -> None:
        """Move to the best neighbour unless it is worse; restart after `patience` neighbours without an improvement."""
        found = min(generation, key=lambda scored: scored.score)
        height = math.inf if self.at is None else self.at.score
        self.n_in_vain = 0 if found.score < height else self.n_in_vain + len(generation)
        if math.isfinite(found.score) and found.score <= height:
            self.at = found
        if self.n_in_vain >= self.patience:
            self._restart()

    def propose(self, rng: np.random.Generator) -> SubNet:
        """Propose a neighbour of the current sub-network, or a random sub-network at the start of a climb."""
        if self.at is None:
            return self.space.sample(rng)
        return self.space.mutate(rng, self.at.subnet, self.mutation_probability)
