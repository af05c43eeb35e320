"""Built-in samplers."""

from __future__ import annotations

import numpy as np

from litgpt_whittle.samplers.base import Networks, Sampler
from litgpt_whittle.setting_checks import (
    check_positive,
    check_shares,
)
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet


class Standard(Sampler):
    """Standard training: only the full network."""

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """Return the full network."""
        return [None]


class Uniform(Sampler):
    """Random sub-networks.

    Args:
        space: Space of sub-networks.
        n: Number of sub-networks per step.
    """

    def __init__(self, space: Space, n: int = 1) -> None:
        super().__init__(space)
        check_positive("supernet.sampler", n=n)
        self.n = n

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """Return n random sub-networks."""
        return [self.space.sample(rng) for _ in range(self.n)]


class RandomLinear(Sampler):
    """A random sub-network, with a probability that changes linearly, else the full network (arXiv 2405.02267).

    Args:
        space: Space of sub-networks.
        start: Probability of a sub-network at the start of training.
        end: Probability of a sub-network at the end of training.
    """

    def __init__(self, space: Space, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__(space)
        check_shares("supernet.sampler", start=start, end=end)
        self.start, self.end = start, end

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """Return a random sub-network or the full network."""
        is_part = rng.random() < self.start + (self.end - self.start) * done
        return [self.space.sample(rng) if is_part else None]


class Alternate(Uniform):
    """The full network and random sub-networks in alternating steps (ATS, arXiv 2106.08895)."""

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """Return the full network in even steps, and random sub-networks in odd steps."""
        return super().networks(rng, step, done) if step % 2 else [None]


class Sandwich(Uniform):
    """Sandwich rule: the largest network, the smallest one, and random ones (arXiv 1903.05134).

    Args:
        space: Space of sub-networks.
        n: Number of random sub-networks per step.
    """

    def __init__(self, space: Space, n: int = 2) -> None:
        super().__init__(space, n)
        self.smallest = space.smallest()

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """Return the full network, the smallest sub-network and n random ones."""
        return [None, self.smallest, *super().networks(rng, step, done)]


class InPlaceDistillation(Sandwich):
    """Sandwich rule in which the full network is the teacher of the smaller ones (arXiv 1903.05134)."""

    teaches = True


class SizeWeighted(Uniform):
    """Random sub-networks, with a probability inversely proportional to their number of parameters.

    Args:
        space: Space of sub-networks.
        n: Number of sub-networks per step.
        n_drawn: Number of random candidates from which each sub-network is chosen.
    """

    def __init__(self, space: Space, n: int = 1, n_drawn: int = 16) -> None:
        super().__init__(space, n)
        check_positive("supernet.sampler", n_drawn=n_drawn)
        self.n_drawn = n_drawn

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """Return n sub-networks; smaller ones are more likely."""
        return [self._one(rng) for _ in range(self.n)]

    def _one(self, rng: np.random.Generator) -> SubNet:
        drawn = [self.space.sample(rng) for _ in range(self.n_drawn)]
        weights = 1 / np.array([self.space.n_params(subnet) for subnet in drawn])
        return drawn[int(rng.choice(len(drawn), p=weights / weights.sum()))]
