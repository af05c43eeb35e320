"""Checks of the samplers of super-network training.

Each check takes a function of a space that returns a sampler, such as its class.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from litgpt_whittle.samplers import Networks, Sampler
from litgpt_whittle.spaces.args import SizeArgs, SpaceArgs
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.testing.inputs import LEAN

Make = Callable[[Space], Sampler]
"""Returns a sampler of a space: its class, or a `functools.partial` with settings"""

N_STEPS = 16
_SMALLEST = SpaceArgs(smallest=SizeArgs(n_embd=16, n_query_groups=1, intermediate_size=32))
SPACES = tuple(Space(LEAN, name, args=_SMALLEST) for name in ("fine_layerwise", "coarse_uniform"))


def check_sampler(make: Make) -> None:
    """Run all checks of `CHECKS` on a sampler.

    Args:
        make: Returns a sampler of a space: its class, or a `functools.partial` with settings.

    Raises:
        AssertionError: If the sampler breaks a rule, which the message names.
    """
    for check in CHECKS:
        check(make)


def networks(sampler: Sampler, step: int) -> Networks:
    """Return the networks of a step out of `N_STEPS`, with the random generator of that step."""
    return sampler.networks(np.random.default_rng(step), step, step / N_STEPS)


# -- rules


def check_networks(make: Make) -> None:
    """Check that each step has networks: sub-networks of the space or the full network."""
    for space in SPACES:
        sampler = make(space)
        for step in range(N_STEPS):
            found = networks(sampler, step)
            assert found, f"every step must have at least one network, step {step} has none"
            for subnet in found:
                if subnet is None:
                    continue
                assert subnet.teacher == space.teacher, "networks must be sub-networks of the space's teacher"
                n, bin = space.n_params(subnet), space.bin
                assert n in bin, f"networks must lie in the space's bin {bin}, one of step {step} has {n:,} parameters"


def check_resume(make: Make) -> None:
    """Check that the networks of a step depend only on the arguments, so that a resumed run continues exactly."""
    for space in SPACES:
        whole = make(space)
        expected = [networks(whole, step) for step in range(N_STEPS)]
        np.random.seed(0)  # a sampler must not use global generators
        resumed = make(space)
        for step in range(N_STEPS - 1, -1, -1):
            same = networks(resumed, step) == expected[step]
            assert same, f"the networks of a step must depend on its arguments only, those of step {step} differ"


def check_teacher(make: Make) -> None:
    """Check that the full network comes first in every step, if the sampler sets `teaches`.

    Not required of other samplers.
    """
    sampler = make(SPACES[0])
    if sampler.teaches:
        for step in range(N_STEPS):
            first = networks(sampler, step)[0]
            assert first is None, f"a sampler with teaches must begin with the full network, None; step {step} does not"


CHECKS: tuple[Callable[[Make], None], ...] = (check_networks, check_resume, check_teacher)
"""All rules of a sampler, which can be run one by one"""
