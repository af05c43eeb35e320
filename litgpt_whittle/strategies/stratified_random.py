"""Random search with parameter counts spread evenly over the bin, unlike `Space.sample`."""

from __future__ import annotations

import numpy as np

from litgpt_whittle.setting_checks import check_positive
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies.base import Strategy
from litgpt_whittle.subnet import SubNet


class StratifiedRandom(Strategy):
    """Random sub-networks of all sizes, one from every stratum of the bin in turn.

    Args:
        n_strata: Number of equal parts of the bin; parts without sub-networks are skipped.
    """

    def __init__(self, n_strata: int = 10) -> None:
        check_positive("strategy", n_strata=n_strata)
        self.n_strata = n_strata

    def start(self, space: Space, seed: int) -> None:
        """Start a new search and discard any earlier state."""
        super().start(space, seed)
        self.strata = space.split(self.n_strata)

    def propose(self, rng: np.random.Generator) -> SubNet:
        """Propose a random sub-network of the next stratum."""
        return self.strata[self.n_asked % len(self.strata)].sample(rng)
