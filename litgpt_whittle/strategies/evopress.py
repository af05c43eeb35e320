"""The (1 + λ) evolution of EvoPress (arXiv 2410.14649, algorithm 1)."""

from __future__ import annotations

import math

import numpy as np

from litgpt_whittle.setting_checks import check_positive
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.subnet import SubNet


class EvoPress(Generations):
    """Evolution of a single parent: offspring trade the size of one part for another, keeping the parameter count.

    The paper selects offspring in stages with more and more tokens. Racing (`litgpt_whittle.searching.racing`) does
    that for any strategy, and makes EvoPress cheap.

    Args:
        n_initial: Number of random sub-networks to start with; the best one becomes the first parent.
        n_children: Number of offspring per generation, λ.
        max_trades: Maximum number of trades per offspring. The actual number is the smaller of two uniform draws
            from 1 to this maximum.
    """

    def __init__(self, n_initial: int = 32, n_children: int = 16, max_trades: int = 3) -> None:
        check_positive("strategy", n_initial=n_initial, n_children=n_children, max_trades=max_trades)
        self.n_initial = n_initial
        self.n_children = n_children
        self.max_trades = max_trades

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        self.parent: Scored | None = None
        super().start(space, seed)

    @property
    def generation_size(self) -> int:
        """Number of random sub-networks in the first generation, number of offspring in later ones."""
        return self.n_children if self.history else self.n_initial

    def select(self, generation: list[Scored]) -> None:
        """Select the best of the offspring and the parent as the next parent; in a tie, prefer an offspring."""
        candidates = [*generation, *([self.parent] if self.parent else [])]
        best = min(candidates, key=lambda scored: scored.score)
        self.parent = best if math.isfinite(best.score) else None

    def propose(self, rng: np.random.Generator) -> SubNet:
        """Propose an offspring of the parent, or a random sub-network while there is no parent."""
        if self.parent is None:
            return self.space.sample(rng)
        child = self.parent.subnet
        for _ in range(int(rng.integers(1, self.max_trades + 1, size=2).min())):
            child = self.space.trade(rng, child)
        return child
