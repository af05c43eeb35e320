"""A search strategy: simulated annealing (Kirkpatrick, Gelatt and Vecchi, Science 220, 1983)."""

from __future__ import annotations

import math

import numpy as np

from litgpt_whittle import SubNet, UserError
from litgpt_whittle.spaces import Space
from litgpt_whittle.strategies import Generations, Scored


class SimulatedAnnealing(Generations):
    """Random walk over mutations that accepts worse sub-networks with a probability that falls during the search.

    A score that is worse by the fraction d is accepted with probability exp(-d / temperature) (Metropolis).

    Args:
        temperature: Initial temperature. With 0.1, one in e steps to a score 10 % worse is accepted.
        cooling: Factor of the temperature after each candidate.
        mutation_probability: Probability that a choice (a size, a set of units, the layers) changes; at least one does.
    """

    generation_size = 1  # each candidate depends on the previous score
    n_kept = None  # continues from candidates that are not the best, so it needs exact scores of all

    def __init__(self, temperature: float = 0.1, cooling: float = 0.98, mutation_probability: float = 0.1) -> None:
        if not temperature > 0:
            raise UserError(f"strategy.temperature must be above 0, got {temperature}; 0.1 is usual")
        if not 0 < cooling <= 1:
            raise UserError(f"strategy.cooling must be above 0 and at most 1, got {cooling}; 0.98 is usual")
        self.temperature, self.cooling, self.mutation_probability = temperature, cooling, mutation_probability

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        self.at: Scored | None = None
        super().start(space, seed)

    def propose(self, rng: np.random.Generator) -> SubNet:
        """Propose a mutation of the current sub-network; at the start, a random one."""
        if self.at is None:
            return self.space.sample(rng)
        return self.space.mutate(rng, self.at.subnet, self.mutation_probability)

    def select(self, generation: list[Scored]) -> None:
        """Accept or reject the candidate."""
        (found,) = generation
        if math.isfinite(found.score) and (self.at is None or self._accepts(found.score, self.at.score)):
            self.at = found

    def _accepts(self, score: float, here: float) -> bool:
        heat = self.temperature * self.cooling ** len(self.history) * abs(here)
        rng = np.random.default_rng((self.seed, len(self.history), 1))  # not the draws of the next proposal
        return score <= here or (heat > 0 and rng.random() < math.exp((here - score) / heat))
