"""The evolutionary search of arXiv 2510.07227, with every candidate built into the bin instead of rejected into it."""

from __future__ import annotations

import numpy as np

from litgpt_whittle.errors import UserError
from litgpt_whittle.space import Space
from litgpt_whittle.strategies.base import Scored, Strategy
from litgpt_whittle.subnet import SubNet


class Evolution(Strategy):
    """Keeps the best sub-networks, mutates and crosses them.

    Args:
        population_size: Random sub-networks to start with.
        elites: How many of the best so far are kept as parents.
        n_offspring: New sub-networks per generation.
        crossover_probability: How likely a child mixes two parents instead of mutating one.
        mutation_probability: How likely each of a parent's choices (a size, a set of units, the layers) changes.
        random_fraction: The share of each generation that is random, against settling too early.
    """

    def __init__(
        self,
        population_size: int = 50,
        elites: int = 10,
        n_offspring: int = 50,
        crossover_probability: float = 0.3,
        mutation_probability: float = 0.1,
        random_fraction: float = 0.05,
    ) -> None:
        for name, n in (("population_size", population_size), ("elites", elites), ("n_offspring", n_offspring)):
            if n < 1:
                raise UserError(f"strategy.{name} must be at least 1, got {n}")
        for name, share in (
            ("crossover_probability", crossover_probability),
            ("mutation_probability", mutation_probability),
            ("random_fraction", random_fraction),
        ):
            if not 0 <= share <= 1:
                raise UserError(f"strategy.{name} must be between 0 and 1, got {share}")
        self.population_size = population_size
        self.elites = elites
        self.n_offspring = n_offspring
        self.crossover_probability = crossover_probability
        self.mutation_probability = mutation_probability
        self.random_fraction = random_fraction

    def start(self, space: Space, seed: int) -> None:
        """Begins a search, forgetting any earlier one."""
        super().start(space, seed)
        self.parents: list[Scored] = []
        self.generation_ends = self.population_size

    @property
    def ready(self) -> int:
        """What is left of this generation; the next one needs all of its scores."""
        return self.generation_ends - self.n_asked

    def tell(self, subnet: SubNet, score: float) -> None:
        """Takes a score; the last one of a generation chooses the parents of the next."""
        super().tell(subnet, score)
        if len(self.told) == self.generation_ends:
            ranked = sorted([*self.parents, *self.told[-self._generation_size() :]], key=lambda scored: scored.score)
            self.parents = [scored for scored in ranked if np.isfinite(scored.score)][: self.elites]
            self.generation_ends += self.n_offspring

    def _generation_size(self) -> int:
        return self.population_size if self.generation_ends == self.population_size else self.n_offspring

    def propose(self, rng: np.random.Generator) -> SubNet:
        """A random sub-network in the first generation, later mostly a child of the best ones."""
        if not self.parents or rng.random() < self.random_fraction:
            return self.space.sample(rng)
        mother = self._parent(rng)
        if len(self.parents) == 1 or rng.random() >= self.crossover_probability:
            return self.space.mutate(rng, mother, self.mutation_probability)
        child = self.space.crossover(rng, mother, self._parent(rng))
        return child if child not in self._asked else self.space.mutate(rng, child, self.mutation_probability)

    def _parent(self, rng: np.random.Generator) -> SubNet:
        return self.parents[int(rng.integers(len(self.parents)))].subnet
