"""The (1 + λ) evolution of EvoPress (arXiv 2410.14649, algorithm 1)."""

from __future__ import annotations

import math

import numpy as np

from litgpt_whittle.searching.args import check_positive
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Scored
from litgpt_whittle.strategies.generations import Generations
from litgpt_whittle.subnet import SubNet


class EvoPress(Generations):
    """Keeps one parent, whose offspring trade the size of one part for that of another, so that the budget stays met.

    The paper selects offspring in steps of more and more tokens; a race (`litgpt_whittle.searching.racing`) does that
    for any strategy, and is what makes this one cheap. Args: n_initial: Random sub-networks to start with, the best of
    which becomes the first parent. n_children: Offspring per generation, λ. max_trades: Each offspring makes the
    smaller of two random numbers of trades between 1 and this.
    """

    def __init__(self, n_initial: int = 32, n_children: int = 16, max_trades: int = 3) -> None:
        check_positive("strategy", n_initial=n_initial, n_children=n_children, max_trades=max_trades)
        self.n_initial = n_initial
        self.n_children = n_children
        self.max_trades = max_trades

    def start(self, space: Space, seed: int) -> None:
        """Begins a search, forgetting any earlier one."""
        self.parent: Scored | None = None
        super().start(space, seed)

    @property
    def generation_size(self) -> int:
        """Random sub-networks first, then offspring."""
        return self.n_children if self.told else self.n_initial

    def select(self, generation: list[Scored]) -> None:
        """The best of offspring and parent is the next parent, an offspring where they are equal."""
        candidates = [*generation, *([self.parent] if self.parent else [])]
        best = min(candidates, key=lambda scored: scored.score)
        self.parent = best if math.isfinite(best.score) else None

    def propose(self, rng: np.random.Generator) -> SubNet:
        """An offspring of the parent, a random sub-network while there is none."""
        if self.parent is None:
            return self.space.sample(rng)
        child = self.parent.subnet
        for _ in range(int(rng.integers(1, self.max_trades + 1, size=2).min())):
            child = self.space.trade(rng, child)
        return child
