"""The evolutionary search of arXiv 2510.07227, with candidates built within the bin, not by rejection sampling."""

from __future__ import annotations

import numpy as np

from litgpt_whittle.setting_checks import (
    check_positive,
    check_shares,
)
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.subnet import SubNet


class Evolution(Generations):
    """Evolutionary search by mutation and crossover of the best sub-networks.

    Args:
        population_size: Number of random sub-networks in the first generation.
        elites: Number of best sub-networks to keep as parents.
        n_offspring: Number of new sub-networks per generation.
        crossover_probability: Probability that a child combines two parents instead of mutating one.
        mutation_probability: Probability of a change for each choice of the parent: a size, a set of units, the layers.
        random_fraction: Share of random sub-networks in each generation, against premature convergence.
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
        check_positive("strategy", population_size=population_size, elites=elites, n_offspring=n_offspring)
        check_shares(
            "strategy",
            crossover_probability=crossover_probability,
            mutation_probability=mutation_probability,
            random_fraction=random_fraction,
        )
        self.population_size = population_size
        self.elites = elites
        self.n_offspring = n_offspring
        self.crossover_probability = crossover_probability
        self.mutation_probability = mutation_probability
        self.random_fraction = random_fraction

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        self.parents: list[Scored] = []
        super().start(space, seed)

    @property
    def n_kept(self) -> int:  # type: ignore[override]
        """Number of elites."""
        return self.elites

    @property
    def generation_size(self) -> int:
        """Number of random sub-networks in the first generation, number of offspring in later ones."""
        return self.n_offspring if self.history else self.population_size

    def select(self, generation: list[Scored]) -> None:
        """Keep the best of the parents and the offspring as the next parents."""
        ranked = sorted([*self.parents, *generation], key=lambda scored: scored.score)
        self.parents = [scored for scored in ranked if np.isfinite(scored.score)][: self.elites]

    def propose(self, rng: np.random.Generator) -> SubNet:
        """Propose a random sub-network in the first generation, later mostly a child of the best sub-networks."""
        if not self.parents or rng.random() < self.random_fraction:
            return self.space.sample(rng)
        mother = self._parent(rng)
        if len(self.parents) == 1 or rng.random() >= self.crossover_probability:
            return self.space.mutate(rng, mother, self.mutation_probability)
        child = self.space.crossover(rng, mother, self._parent(rng))
        return child if child not in self._asked else self.space.mutate(rng, child, self.mutation_probability)

    def _parent(self, rng: np.random.Generator) -> SubNet:
        return self.parents[int(rng.integers(len(self.parents)))].subnet
