"""Test the choice of units against trying every choice."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litgpt_whittle.repair.importance import elimination_order


def best(covariance: torch.Tensor, weight: torch.Tensor, units: torch.Tensor, n: int) -> list[int]:
    """Return the n units that are removed last."""
    return sorted(set(range(len(units))) - set(elimination_order(covariance, weight, units, n)))


def loss(covariance, weight, kept, damping=0.0):
    """Return E‖W z − Ŵ z_kept‖² with the best Ŵ, directly from the regression."""
    gone = [i for i in range(len(covariance)) if i not in kept]
    damped = covariance + damping * torch.diag(covariance.diagonal())
    share = torch.linalg.solve(damped[kept][:, kept], damped[kept][:, gone])
    rest = damped[gone][:, gone] - damped[gone][:, kept] @ share
    return float(((weight[:, gone] @ rest) * weight[:, gone]).sum())


def problem(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(200, n, generator=generator, dtype=torch.float64)
    z = z @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    return z.T @ z / 200, torch.randn(3, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 3])
@given(seed=st.integers(0, 200))
def test_each_removal_is_the_cheapest_that_there_is(size, seed):
    covariance, weight = problem(6 * size, seed)
    units = torch.randperm(6 * size, generator=torch.Generator().manual_seed(seed)).view(6, size)
    order = elimination_order(covariance, weight, units, damping=1e-4)
    assert sorted(order) == list(range(6))
    alive = list(range(6))
    for unit in order[:-1]:
        costs = {
            u: loss(covariance, weight, units[[a for a in alive if a != u]].flatten().tolist(), 1e-4) for u in alive
        }
        assert costs[unit] <= min(costs.values()) * (1 + 1e-6)
        alive.remove(unit)


def test_one_of_each_pair_of_copies_is_kept():
    covariance, weight = problem(5)
    twice = torch.cat([torch.eye(5, dtype=torch.float64)] * 2)
    covariance, weight = twice @ covariance @ twice.T, torch.cat([weight, weight], 1)
    kept = best(covariance, weight, torch.arange(10)[:, None], 5)
    assert sorted(i % 5 for i in kept) == list(range(5))
    assert loss(covariance, weight, kept) < 1e-6


def test_the_choice_is_near_the_best_of_all_choices():
    for seed in range(10):
        covariance, weight = problem(8, seed)
        kept = best(covariance, weight, torch.arange(8)[:, None], 4)
        least = min(loss(covariance, weight, list(c)) for c in itertools.combinations(range(8), 4))
        first = loss(covariance, weight, [0, 1, 2, 3])
        assert loss(covariance, weight, kept) <= least + 0.25 * (first - least)


def test_many_units_are_removed_some_at_a_time_at_little_loss():
    covariance, weight = problem(256)
    kept = best(covariance, weight, torch.arange(256)[:, None], 128)
    alive = list(range(256))
    for _ in range(128):  # one after the other, by the formula for one
        inverse = torch.linalg.inv(covariance[alive][:, alive])
        repaired = torch.linalg.solve(covariance[alive][:, alive], covariance[alive] @ weight.T)
        del alive[int((repaired.square().sum(1) / inverse.diagonal()).argmin())]
    assert len(kept) == 128
    assert loss(covariance, weight, kept, 1e-4) < 1.3 * loss(covariance, weight, alive, 1e-4)
