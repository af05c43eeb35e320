"""A search strategy: simulated annealing (Kirkpatrick, Gelatt and Vecchi, Science 220, 1983)."""

from __future__ import annotations

import math

import numpy as np

from litgpt_whittle import SubNet, UserError
from litgpt_whittle.spaces import Space
from litgpt_whittle.strategies import Generations, Scored


class SimulatedAnnealing(Generations):
    """Walks from one sub-network to a mutated one, uphill too, but ever more rarely.

    A step to a score that is worse by the share d is made with the probability exp(-d / temperature), Metropolis' rule.

    Args:
        temperature: At the beginning. With 0.1, every e-th step to a score 10 % worse is made.
        cooling: What the temperature is multiplied by after every candidate.
        mutation_probability: How likely each choice (a size, a set of units, the layers) changes; at least one does.
    """

    generation_size = 1  # each candidate needs the score of the one before
    n_kept = None  # it goes on from candidates that are not the best, and so needs every score exactly

    def __init__(self, temperature: float = 0.1, cooling: float = 0.98, mutation_probability: float = 0.1) -> None:
        if not temperature > 0:
            raise UserError(f"strategy.temperature must be above 0, got {temperature}; 0.1 is usual")
        if not 0 < cooling <= 1:
            raise UserError(f"strategy.cooling must be above 0 and at most 1, got {cooling}; 0.98 is usual")
        self.temperature, self.cooling, self.mutation_probability = temperature, cooling, mutation_probability

    def start(self, space: Space, seed: int) -> None:
        """Begins a search, forgetting any earlier one."""
        self.at: Scored | None = None
        super().start(space, seed)

    def propose(self, rng: np.random.Generator) -> SubNet:
        """A neighbour of where the walk is, a random sub-network at its start."""
        if self.at is None:
            return self.space.sample(rng)
        return self.space.mutate(rng, self.at.subnet, self.mutation_probability)

    def select(self, generation: list[Scored]) -> None:
        """Makes the step, or stays."""
        (found,) = generation
        if math.isfinite(found.score) and (self.at is None or self._accepts(found.score, self.at.score)):
            self.at = found

    def _accepts(self, score: float, here: float) -> bool:
        heat = self.temperature * self.cooling ** len(self.told) * abs(here)
        rng = np.random.default_rng((self.seed, len(self.told), 1))  # not the one of the next proposal
        return score <= here or (heat > 0 and rng.random() < math.exp((here - score) / heat))
