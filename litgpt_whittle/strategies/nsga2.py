"""Multi-objective search by NSGA-II (Deb et al. 2002, doi:10.1109/4235.996017), with non-dominated sorting by pymoo."""

from __future__ import annotations

import math

import numpy as np

from litgpt_whittle.errors import UserError
from litgpt_whittle.extras import require
from litgpt_whittle.setting_checks import (
    check_positive,
    check_shares,
)
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.subnet import SubNet


class NSGA2(Generations):
    """NSGA-II: search for non-dominated sub-networks, spread along the Pareto front.

    Args:
        objectives: Objectives to minimise: `score` for the fitness, and measures by name, such as `n_params`.
        population_size: Number of sub-networks per generation, and maximum number of parents.
        crossover_probability: Probability that a child combines two parents instead of mutating one.
        mutation_probability: Probability of a change for each choice of the parent: a size, a set of units, the layers.
    """

    def __init__(
        self,
        objectives: tuple[str, ...] = ("score", "n_params"),
        population_size: int = 50,
        crossover_probability: float = 0.3,
        mutation_probability: float = 0.1,
    ) -> None:
        require("pymoo", extra="nsga2", what="strategy NSGA2")
        self.objectives = tuple(objectives)
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise UserError(
                f"strategy.objectives must be one or more different names, got {list(self.objectives)}; for example "
                "[score, n_params]"
            )
        check_positive("strategy", population_size=population_size)
        check_shares("strategy", crossover_probability=crossover_probability, mutation_probability=mutation_probability)
        self.population_size = population_size
        self.crossover_probability = crossover_probability
        self.mutation_probability = mutation_probability

    n_kept = None

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        self.parents: list[Scored] = []
        super().start(space, seed)

    @property
    def generation_size(self) -> int:
        """Population size."""
        return self.population_size

    @property
    def front(self) -> list[Scored]:
        """Non-dominated sub-networks, in the order in which they were reported."""
        from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

        pool = self._successful(self.history)
        if not pool:
            return []
        best = NonDominatedSorting().do(self._values(pool), only_non_dominated_front=True)
        return [pool[i] for i in sorted(best)]

    def select(self, generation: list[Scored]) -> None:
        """Keep the first fronts as parents, the least crowded first within each front."""
        from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
        from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

        pool = [*self.parents, *self._successful(generation)]
        if not pool:
            return
        values, ranked = self._values(pool), []
        for front in map(np.sort, NonDominatedSorting().do(values)):
            crowding = get_crowding_function("cd").do(values[front])
            ranked += front[np.argsort(-crowding, kind="stable")].tolist()
        self.parents = [pool[i] for i in ranked[: self.population_size]]

    def propose(self, rng: np.random.Generator) -> SubNet:
        """Propose a child of parents chosen by binary tournaments, or a random sub-network in the first generation."""
        if not self.parents:
            return self.space.sample(rng)
        child = mother = self._parent(rng)
        if rng.random() < self.crossover_probability:
            child = self.space.crossover(rng, mother, self._parent(rng))
        return child if child not in self._asked else self.space.mutate(rng, child, self.mutation_probability)

    def _parent(self, rng: np.random.Generator) -> SubNet:
        # binary tournament: the parents are sorted, so the smaller index wins
        return self.parents[int(rng.integers(len(self.parents), size=2).min())].subnet

    def _successful(self, scored: list[Scored]) -> list[Scored]:
        """Return the sub-networks with a finite score and finite objectives."""
        return [one for one in scored if math.isfinite(one.score) and np.isfinite(self._values([one])).all()]

    def _values(self, scored: list[Scored]) -> np.ndarray:
        """Return the objectives, shape (n, n_objectives)."""
        known = [{**one.measures, "score": one.score} for one in scored]
        for name in self.objectives:
            if any(name not in measures for measures in known):
                raise UserError(f"strategy.objectives names {name!r}, which was not measured; pass it to `tell`")
        return np.array([[measures[name] for name in self.objectives] for measures in known])
