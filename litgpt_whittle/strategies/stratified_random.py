"""Random search that is even over the bin, which `Space.sample` need not be."""

from __future__ import annotations

import numpy as np

from litgpt_whittle.searching.args import check_positive
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Strategy
from litgpt_whittle.subnet import SubNet


class StratifiedRandom(Strategy):
    """Tries random sub-networks of all sizes: the bin is cut into strata, and each round takes one from every stratum.

    Args:
        n_strata: How many equal parts the bin is cut into; parts in which no sub-network lies are passed over.
    """

    def __init__(self, n_strata: int = 10) -> None:
        check_positive("strategy", n_strata=n_strata)
        self.n_strata = n_strata

    def start(self, space: Space, seed: int) -> None:
        """Begins a search, forgetting any earlier one."""
        super().start(space, seed)
        self.strata = space.split(self.n_strata)

    def propose(self, rng: np.random.Generator) -> SubNet:
        """A random sub-network of the next stratum."""
        return self.strata[self.n_asked % len(self.strata)].sample(rng)
