"""The samplers that come with the project."""

from __future__ import annotations

import numpy as np

from litgpt_whittle.samplers.base import Networks, Sampler
from litgpt_whittle.searching.args import check_positive, check_shares
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet


class Standard(Sampler):
    """The full network only: plain training."""

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """The full network."""
        return [None]


class Uniform(Sampler):
    """Random sub-networks.

    Args:
        space: The sub-networks that there are.
        n: How many a step trains.
    """

    def __init__(self, space: Space, n: int = 1) -> None:
        super().__init__(space)
        check_positive("supernet.sampler", n=n)
        self.n = n

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """Some of them."""
        return [self.space.sample(rng) for _ in range(self.n)]


class RandomLinear(Sampler):
    """The full network or a random sub-network, whose probability grows linearly (arXiv 2405.02267).

    Args:
        space: The sub-networks that there are.
        start: The probability of a sub-network at the beginning.
        end: The same in the end.
    """

    def __init__(self, space: Space, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__(space)
        check_shares("supernet.sampler", start=start, end=end)
        self.start, self.end = start, end

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """One of the two."""
        is_part = rng.random() < self.start + (self.end - self.start) * done
        return [self.space.sample(rng) if is_part else None]


class Alternate(Uniform):
    """The full network and random sub-networks by turns (ATS, arXiv 2106.08895)."""

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """The full network in even steps."""
        return super().networks(rng, step, done) if step % 2 else [None]


class Sandwich(Uniform):
    """The largest network, the smallest one, and random ones between (arXiv 1903.05134).

    Args:
        space: The sub-networks that there are.
        n: How many random ones.
    """

    def __init__(self, space: Space, n: int = 2) -> None:
        super().__init__(space, n)
        self.smallest = space.smallest()

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """All of them."""
        return [None, self.smallest, *super().networks(rng, step, done)]


class InPlaceDistillation(Sandwich):
    """The sandwich, whose smaller networks learn from what the largest one says (arXiv 1903.05134)."""

    teaches = True


class SizeWeighted(Uniform):
    """Random sub-networks, the smaller the likelier: p ∝ 1 / parameters.

    Args:
        space: The sub-networks that there are.
        n: How many a step trains.
        n_drawn: Random ones that each is drawn from.
    """

    def __init__(self, space: Space, n: int = 1, n_drawn: int = 16) -> None:
        super().__init__(space, n)
        check_positive("supernet.sampler", n_drawn=n_drawn)
        self.n_drawn = n_drawn

    def networks(self, rng: np.random.Generator, step: int, done: float) -> Networks:
        """Some of them."""
        return [self._one(rng) for _ in range(self.n)]

    def _one(self, rng: np.random.Generator) -> SubNet:
        drawn = [self.space.sample(rng) for _ in range(self.n_drawn)]
        weights = 1 / np.array([self.space.n_params(subnet) for subnet in drawn])
        return drawn[int(rng.choice(len(drawn), p=weights / weights.sum()))]
