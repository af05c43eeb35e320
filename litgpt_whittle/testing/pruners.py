"""Checks of pruners.

Each check takes a function of the sparsity that returns a pruner, such as its class.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from litgpt_whittle.contrib.prune import Pruner, Sparsity
from litgpt_whittle.least_squares import Moments, no_outputs

Make = Callable[[Sparsity], Pruner]
"""Returns a pruner for a sparsity: its class, or a `functools.partial` with settings"""

N_CASES = 25


def check_pruner(make: Make) -> None:
    """Run all checks of `CHECKS` on a pruner.

    Args:
        make: Returns a pruner for a sparsity: its class, or a `functools.partial` with settings.

    Raises:
        AssertionError: If the pruner breaks a rule, which the message names.
    """
    for check in CHECKS:
        check(make)


def moments_of(x: torch.Tensor) -> Moments:
    """Return the moments of inputs, shape (n, n_in)."""
    moments = Moments(x.shape[1], 0)
    moments.add(x, no_outputs(x))
    return moments


def problem(n_out: int, n_in: int, n: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights (n_out, n_in), and correlated inputs (n, n_in) of different scales."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_in, n_in, generator=generator) + 2 * torch.randn(n_in, 1, generator=generator)
    x = torch.randn(n, n_in, generator=generator) @ mix * 10 ** (torch.rand(n_in, generator=generator) - 0.5)
    return torch.randn(n_out, n_in, generator=generator), x


def _pruned(make: Make, sparsity: Sparsity, weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Prune a weight, and check what holds for every result."""
    before = weight.clone()
    found = make(sparsity).prune(weight, moments)
    assert torch.equal(weight, before), "prune must not modify the weight that it is given"
    same = found.shape == weight.shape and found.dtype == weight.dtype
    assert same, f"prune must keep shape and type of the weight, got {tuple(found.shape)} and {found.dtype}"
    assert found.isfinite().all(), "pruned weights must be finite"
    assert torch.equal(make(sparsity).prune(weight, moments), found), "a pruner must return the same when called again"
    return found


# -- rules


def check_patterns(make: Make) -> None:
    """Check that a pattern n:m keeps exactly n of every m weights of each output."""
    rng = np.random.default_rng(0)
    for _ in range(N_CASES):
        n_out, n_groups, m = (int(rng.integers(lo, hi + 1)) for lo, hi in ((1, 9), (1, 7), (2, 9)))
        n = int(rng.integers(1, m))
        weight, x = problem(n_out, n_groups * m)
        found = _pruned(make, Sparsity.parse(None, f"{n}:{m}"), weight, moments_of(x))
        stay = (found != 0).unflatten(1, (n_groups, m)).sum(-1)
        assert (stay == n).all(), (
            f"{n} of every {m} weights of an output must stay, {int(stay.min())} to {int(stay.max())} do"
        )


def check_shares(make: Make) -> None:
    """Check that exactly the given share of weights is dropped, of the whole layer or of each output."""
    rng = np.random.default_rng(1)
    for _ in range(N_CASES):
        n_out, n_in, share = int(rng.integers(1, 10)), int(rng.integers(1, 41)), float(rng.uniform(0.01, 0.99))
        weight, x = problem(n_out, n_in)
        is_zero = _pruned(make, Sparsity(share), weight, moments_of(x)) == 0
        of_all = int(is_zero.sum()) == round(share * n_out * n_in)
        of_each = bool((is_zero.sum(1) == round(share * n_in)).all())
        assert of_all or of_each, (
            f"the share {share:.3f} of {n_out} x {n_in} weights must be 0, of the layer or of each output; "
            f"{int(is_zero.sum())} are"
        )


def check_ties(make: Make) -> None:
    """Check that exactly the given share of weights is dropped if all weights and all inputs are equal."""
    for sparsity in (Sparsity(0.25), Sparsity.parse(None, "3:4")):
        n = int((_pruned(make, sparsity, torch.ones(4, 8), moments_of(torch.ones(3, 8))) == 0).sum())
        assert n == 8, f"a quarter of 32 equal weights must be 0, {n} are"


def check_inputs(make: Make) -> None:
    """Check that the share is exact for unused inputs, equal inputs or few tokens.

    A pruner without `reads_data` must also ignore the inputs.
    """
    weight, x = problem(4, 16)
    x[:, 3] = 0  # an input that is never used
    x[:, 5] = x[:, 6]
    for inputs in (x, x[:2], torch.zeros(3, 16)):
        n = int((_pruned(make, Sparsity(0.5), weight, moments_of(inputs)) == 0).sum())
        assert n == 32, f"half of 64 weights must be 0 whatever the inputs, {n} are"
    pruner = make(Sparsity(0.5))
    if not pruner.reads_data:
        same = torch.equal(pruner.prune(weight, None), pruner.prune(weight, moments_of(x)))
        assert same, "a pruner without reads_data must not depend on the inputs"


CHECKS: tuple[Callable[[Make], None], ...] = (check_patterns, check_shares, check_ties, check_inputs)
"""All rules of a pruner, which can be run one by one"""
