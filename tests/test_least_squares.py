"""Test regression from moments against plain least squares on the data itself."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_whittle.least_squares import PRODUCT_ROWS, RIDGES, Moments, fit, products, solve


def data(n: int, n_in: int, n_out: int, seed: int = 0, offset: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, n_in, generator=generator, dtype=torch.float64) @ torch.randn(
        n_in, n_in, generator=generator, dtype=torch.float64
    )
    y = z @ torch.randn(n_in, n_out, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, n_out, generator=generator, dtype=torch.float64)
    return z + offset, y + noise + offset


def moments_of(z: torch.Tensor, y: torch.Tensor, parts: int = 1) -> Moments:
    moments = Moments(z.shape[1], y.shape[1])
    for part_z, part_y in zip(z.chunk(parts), y.chunk(parts)):
        moments.add(part_z, part_y)
    return moments


def lstsq(z, y, anchor, ridge, intercept):
    """Solve the ridge regression by QR, with the ridge as extra rows of data."""
    scale = (z - z.mean(0) if intercept else z).square().mean(0)
    rows = torch.diag((ridge * scale * len(z)).sqrt())
    ones, none = torch.ones(len(z), 1, dtype=z.dtype), torch.zeros(len(scale), 1, dtype=z.dtype)
    inputs = torch.cat([torch.cat([z, ones], 1), torch.cat([rows, none], 1)]) if intercept else torch.cat([z, rows])
    found = torch.linalg.lstsq(inputs, torch.cat([y, rows @ anchor.T])).solution.T
    return (found[:, :-1], found[:, -1]) if intercept else (found, torch.zeros(len(found), dtype=z.dtype))


@given(
    st.integers(1, 8), st.integers(1, 5), st.integers(10, 60), st.booleans(),
    st.sampled_from([r for r in RIDGES if r < math.inf]), st.integers(0, 1000),
)  # fmt: skip
def test_the_solution_is_that_of_lstsq_in_float64(n_in, n_out, n, intercept, ridge, seed):
    z, y = data(n, n_in, n_out, seed)
    anchor = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = solve(moments_of(z, y), anchor, ridge, intercept)
    weight, bias = lstsq(z, y, anchor, ridge, intercept)
    assert found.ridge == ridge
    torch.testing.assert_close(found.weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.bias, bias, rtol=1e-5, atol=1e-5)


def test_moments_of_many_batches_are_those_of_one():
    z, y = data(60, 5, 3)
    one, many = moments_of(z, y), moments_of(z, y, parts=7)
    both = moments_of(z[:25], y[:25]) + moments_of(z[25:], y[25:])
    for name in ("n", "zz", "yz", "z", "y", "yy"):
        for other in (many, both):
            torch.testing.assert_close(getattr(other, name), getattr(one, name))


@pytest.mark.parametrize("with_metric", [False, True])
def test_the_error_is_the_mean_over_the_tokens(with_metric):
    z, y = data(40, 4, 3)
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    off = z @ weight.T + bias - y
    moments = moments_of(z, y)
    if not with_metric:
        assert moments.error(weight, bias) == pytest.approx(float(off.square().sum(1).mean()))
        return
    root = torch.randn(3, 3, dtype=torch.float64)
    metric = root.T @ root
    constant = torch.einsum("ti,ij,tj->t", y, metric, y).mean()
    expected = torch.einsum("ti,ij,tj->t", off, metric, off).mean() - constant
    assert moments.error(weight, bias, metric) == pytest.approx(float(expected))


def test_an_infinite_ridge_is_the_anchor_with_the_best_bias():
    z, y = data(30, 4, 2)
    anchor = torch.randn(2, 4, dtype=torch.float64)
    found = solve(moments_of(z, y), anchor, math.inf, intercept=True)
    assert torch.equal(found.weight, anchor)
    torch.testing.assert_close(found.bias, (y - z @ anchor.T).mean(0))


def test_singular_moments_are_solved_with_a_stronger_ridge():
    z, y = data(30, 3, 2)
    z = torch.cat([z, z, torch.zeros(30, 1, dtype=z.dtype)], 1)  # duplicated inputs, and one that is always zero
    anchor = torch.zeros(2, 7, dtype=torch.float64)
    found = solve(moments_of(z, y), anchor, 0.0, intercept=True)
    assert 0 < found.ridge < 1e-3 and torch.isfinite(found.weight).all()
    assert not found.weight[:, 6].any()
    weight, bias = lstsq(z[:, :3], y, anchor[:, :3], 0.0, True)
    expected = z[:, :3] @ weight.T + bias
    torch.testing.assert_close(z @ found.weight.T + found.bias, expected, rtol=1e-3, atol=1e-3)


def test_the_ridge_is_the_one_that_does_best_on_held_out_tokens():
    z, y = data(12, 10, 2, seed=3)  # hardly more tokens than inputs: plain least squares fits noise
    truth = torch.linalg.lstsq(*data(5000, 10, 2, seed=3)[:2]).solution.T
    held = data(200, 10, 2, seed=4)
    train, held_out, anchor = moments_of(z, y), moments_of(*held), torch.zeros(2, 10, dtype=torch.float64)
    found = fit(train, held_out, anchor, intercept=True)
    errors = {}
    for ridge in RIDGES:
        tried = solve(train, anchor, ridge, True)
        errors[ridge] = float((held[0] @ tried.weight.T + tried.bias - held[1]).square().sum(1).mean())
    assert found.ridge == min(errors, key=errors.get) and truth.shape == found.weight.shape
    torch.testing.assert_close(found.weight, solve(train + held_out, anchor, found.ridge, True).weight)


def test_moments_of_scaled_and_shifted_data_follow_from_those_of_the_data():
    z, y = data(40, 5, 3)
    scale, shift, out_scale, out_shift = (torch.randn(n, dtype=torch.float64) for n in (5, 5, 3, 3))
    found = moments_of(z, y).scaled(scale, shift, out_scale, out_shift)
    expected = moments_of(scale * z + shift, out_scale * y + out_shift)
    assert found.n == expected.n
    for name in ("zz", "yz", "z", "y"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("n", [1, PRODUCT_ROWS, 2 * PRODUCT_ROWS + 3])
def test_products_of_long_matrices_are_those_in_float64_and_need_no_copy_in_it(n):
    a, b = (torch.randn(n, width, generator=torch.Generator().manual_seed(width)) + 5 for width in (3, 4))
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend([out.numel()] if isinstance(out, torch.Tensor) and out.dtype == torch.float64 else [])
            return out

    with Watch():
        plain, centred = products(a, b), products(a, b, centred=True)
    assert max(largest) <= PRODUCT_ROWS * 4
    wide_a, wide_b = a.double(), b.double()
    torch.testing.assert_close(plain, wide_a.T @ wide_b)
    torch.testing.assert_close(centred, (wide_a - wide_a.mean(0)).T @ (wide_b - wide_b.mean(0)))
