"""Base class of samplers, which choose the networks that a training step trains."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet

Networks = list[SubNet | None]
"""Sub-networks; `None` stands for the full network"""


class Sampler(ABC):
    """Sampler of the networks of each step. A subclass takes its settings as keyword arguments after the space.

    Args:
        space: Space of sub-networks.
    """

    teaches = False
    """True if the full network is the teacher of the other networks in a step; it must then come first"""

    def __init__(self, space: Space) -> None:
        self.space = space

    @abstractmethod
    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """Return the networks of one step.

        Args:
            rng: The only source of randomness, a new generator for every step, so that a resumed run draws the same
                networks.
            step: Number of optimizer steps before this one.
            done: Completed fraction of the training, from 0 to 1.
        """
