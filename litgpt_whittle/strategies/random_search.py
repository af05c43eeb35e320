"""Random search, the baseline for all other strategies."""

from __future__ import annotations

import numpy as np

from litgpt_whittle.strategies.base import Strategy
from litgpt_whittle.subnet import SubNet


class RandomSearch(Strategy):
    """Random sub-networks."""

    def __init__(self) -> None:
        pass

    def propose(self, rng: np.random.Generator) -> SubNet:
        """Propose a random sub-network."""
        return self.space.sample(rng)
