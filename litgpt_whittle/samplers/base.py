"""What every sampler is: asked which networks a step trains."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet

Networks = list[SubNet | None]
"""Sub-networks, and `None` for the full network"""


class Sampler(ABC):
    """Chooses the networks of each step. A subclass takes its settings as keyword arguments after the space.

    Args:
        space: The sub-networks that there are.
    """

    teaches = False
    """Whether the full network, which then comes first, teaches those that follow it in a step"""

    def __init__(self, space: Space) -> None:
        self.space = space

    @abstractmethod
    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """The networks of one step.

        Args:
            rng: Where all randomness comes from; a new one for every step, so that a resumed run goes on exactly.
            step: The optimizer steps before it.
            done: The share of the training that is done, from 0 to 1.
        """
