"""Linear regression from moments, shared by repair, unit selection and candidate scoring.

Only sums over tokens are stored, so memory does not grow with the number of tokens. Plain least squares overfits small
calibration sets (arXiv 2510.07782). A ridge therefore shrinks the solution towards an anchor instead of zero. The
anchor is the sliced weights: the solution without any data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from litgpt_whittle.processes import all_reduce_sum
from litgpt_whittle.tensors import in_sums_dtype, sums_dtype

RIDGES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, math.inf)
"""Candidate ridge strengths, relative to the mean squares of the inputs; an infinite ridge gives the anchor"""


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in full precision.

    litgpt's command line enables TF32 on GPUs, whose 10-bit mantissa causes rounding errors larger than most ridges.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


PRODUCT_ROWS = 8192
"""Rows of a matrix per block of `products`"""


def products(a: torch.Tensor, b: torch.Tensor, centred: bool = False) -> torch.Tensor:
    """Return AᵀB in the dtype of sums, shape (n_a, n_b), without converting all rows at once.

    An LM head in float64 may not fit into memory.

    Args:
        a: Shape (n, n_a).
        b: Shape (n, n_b).
        centred: If true, subtract the columns' means first.
    """
    dtype = sums_dtype(a.device)
    means = [weight.mean(0, dtype=dtype) if centred else 0.0 for weight in (a, b)]
    total = torch.zeros(a.size(1), b.size(1), dtype=dtype, device=a.device)
    for rows in zip(a.split(PRODUCT_ROWS), b.split(PRODUCT_ROWS)):
        left = rows[0].to(dtype) - means[0]
        right = left if b is a else rows[1].to(dtype) - means[1]
        total.addmm_(left.T, right)
    return total


class Moments:
    """Sums over tokens of inputs z and outputs y, from which y ≈ W z + b is solved.

    Args:
        n_in: Size of z.
        n_out: Size of y.
        device: Device of the sums.
        fp32_products: If true, multiply in float32, which is twice as fast on the CPU, and accumulate in the dtype of
            the sums. That is precise enough for unit selection, and for solves with many tokens per input. Other
            devices always multiply in float32, since many are tens of times slower in float64.
    """

    def __init__(
        self, n_in: int, n_out: int, device: torch.device | str = "cpu", *, fp32_products: bool = False
    ) -> None:
        dtype = sums_dtype(device)
        self.product_dtype = torch.float32 if fp32_products or torch.device(device).type != "cpu" else dtype
        self.n = 0
        """Number of tokens"""
        self.mass: torch.Tensor | float = 0.0
        """Sum of the tokens' weights; a tensor after `add`, like `yy`, so that no sum waits for the device"""
        self.zz = torch.zeros(n_in, n_in, dtype=dtype, device=device)
        self.yz = torch.zeros(n_out, n_in, dtype=dtype, device=device)
        self.z = torch.zeros(n_in, dtype=dtype, device=device)
        self.y = torch.zeros(n_out, dtype=dtype, device=device)
        self.yy: torch.Tensor | float = 0.0
        """Σ ‖y‖²"""

    def add(self, z: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens.

        Args:
            z: Inputs, shape (…, n_in).
            y: Outputs, shape (…, n_out).
            weights: Weight of each token's squared error, shape (…); 1 by default.
        """
        z, y = (x.flatten(0, -2).to(self.product_dtype) for x in (z, y))
        self.n += len(z)
        root = z.new_ones(len(z)) if weights is None else weights.flatten().to(z.dtype).sqrt()
        if weights is not None:
            z, y = z * root[:, None], y * root[:, None]
        self.mass = self.mass + (len(z) if weights is None else in_sums_dtype(root).square().sum())
        size = z.shape[1]
        step = max(size // 4, 64)
        for i in range(0, size, step):  # z zᵀ is symmetric: blocks below the diagonal are mirrored
            rows, later = slice(i, i + step), slice(i + step, size)
            products = z[:, rows].T @ z[:, i:]
            self.zz[rows, i:] += products
            self.zz[later, rows] += products[:, step:].T
        self.yz += y.T @ z
        self.z += root @ z
        self.y += root @ y
        self.yy = self.yy + in_sums_dtype(y.square().sum())

    def __add__(self, other: Moments) -> Moments:
        total = Moments(len(self.z), len(self.y), self.zz.device)
        total.n = self.n + other.n
        for name in ("mass", "zz", "yz", "z", "y", "yy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def over_processes(self) -> Moments:
        """Sum over all processes, in place; return self."""
        scalars = torch.tensor([self.n, float(self.yy), float(self.mass)], dtype=self.zz.dtype, device=self.zz.device)
        for tensor in (self.zz, self.yz, self.z, self.y, scalars):
            all_reduce_sum(tensor)
        self.n, self.yy, self.mass = int(scalars[0]), float(scalars[1]), float(scalars[2])
        return self

    def with_outputs(self, yz: torch.Tensor, y: torch.Tensor) -> Moments:
        """Return moments of the same inputs with new outputs.

        Args:
            yz: Σ y zᵀ of the new outputs, shape (n_out, n_in).
            y: Σ y of the new outputs, shape (n_out,).
        """
        new = Moments(0, 0, self.zz.device)
        new.n, new.mass, new.zz, new.z, new.yz, new.y = self.n, self.mass, self.zz, self.z, yz, y
        return new

    def affine(
        self, weight: torch.Tensor, bias: torch.Tensor, out_weight: torch.Tensor, out_bias: torch.Tensor
    ) -> Moments:
        """Return moments with affine functions of the inputs z as new inputs and outputs.

        Args:
            weight: D of the new inputs D z + d, shape (n_in', n_in).
            bias: d, shape (n_in',).
            out_weight: E of the new outputs E z + e, shape (n_out', n_in).
            out_bias: e, shape (n_out',).
        """
        d, e, in_bias, out_bias = (x.to(self.zz.dtype) for x in (weight, out_weight, bias, out_bias))
        new = Moments(len(in_bias), len(out_bias), self.zz.device)
        new.n, new.mass = self.n, self.mass
        new.z, new.y = d @ self.z + self.mass * in_bias, e @ self.z + self.mass * out_bias
        half, cross = d @ self.zz, torch.outer(in_bias, d @ self.z)
        new.zz = half @ d.T + cross + cross.T + self.mass * torch.outer(in_bias, in_bias)
        new.yz = e @ half.T + torch.outer(e @ self.z, in_bias) + torch.outer(out_bias, new.z)
        return new

    def scaled(
        self, scale: torch.Tensor, shift: torch.Tensor, out_scale: torch.Tensor, out_shift: torch.Tensor
    ) -> Moments:
        """Return the moments of scale · z + shift and out_scale · y + out_shift, elementwise."""
        scale, shift, out_scale, out_shift = (x.to(self.zz) for x in (scale, shift, out_scale, out_shift))
        new, z, y = Moments(len(self.z), len(self.y), self.zz.device), scale * self.z, out_scale * self.y
        new.n, new.mass, new.z, new.y = self.n, self.mass, z + self.mass * shift, y + self.mass * out_shift
        new.zz = scale[:, None] * self.zz * scale + torch.outer(z, shift) + torch.outer(shift, new.z)
        new.yz = out_scale[:, None] * self.yz * scale + torch.outer(y, shift) + torch.outer(out_shift, new.z)
        return new

    def covariances(self, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted means of z zᵀ and y zᵀ, centred if the regression has an intercept."""
        zz, yz = self.zz / self.mass, self.yz / self.mass
        if intercept:
            mean_z, mean_y = self.z / self.mass, self.y / self.mass
            # in place, since these are the largest tensors of a repair
            zz -= torch.outer(mean_z, mean_z)
            yz -= torch.outer(mean_y, mean_z)
        return zz, yz

    def error(self, weight: torch.Tensor, bias: torch.Tensor, metric: torch.Tensor | None = None) -> float:
        """Return the weighted mean of ‖W z + b − y‖² over the tokens.

        Args:
            weight: W, shape (n_out, n_in).
            bias: b, shape (n_out,).
            metric: Matrix M, shape (n_out, n_out). If given, return the mean of eᵀ M e for the error e, up to a
                constant independent of W and b.
        """
        w, b = weight.to(self.zz.dtype), bias.to(self.zz.dtype)
        wz = w @ self.z
        # Σ (Wz + b − y)(Wz + b − y)ᵀ without the term Σ y yᵀ, of which only the trace is known
        if metric is None:
            total = ((w @ self.zz) * w).sum() - 2 * (w * self.yz).sum() + self.mass * b @ b + 2 * b @ (wz - self.y)
            return float((total + self.yy) / self.mass)
        mw, mb = metric @ w, metric @ b
        total = ((mw @ self.zz) * w).sum() - 2 * (mw * self.yz).sum() + self.mass * b @ mb + 2 * mb @ (wz - self.y)
        return float(total / self.mass)


def no_outputs(like: torch.Tensor) -> torch.Tensor:
    """Return outputs of size zero, for moments of inputs alone."""
    return like.new_zeros(*like.shape[:-1], 0)


@dataclass
class Fit:
    """Solution of a regression."""

    weight: torch.Tensor
    """W, shape (n_out, n_in)"""
    bias: torch.Tensor
    """b, shape (n_out,); zeros if no intercept was fitted"""
    ridge: float
    """Relative strength that was used; larger than requested if the moments are singular"""


def solve(moments: Moments, anchor: torch.Tensor, ridge: float, intercept: bool) -> Fit:
    """Minimise the mean of ‖W z + b − y‖² + ridge · Σⱼ dⱼ ‖Wⱼ − anchorⱼ‖², with dⱼ the mean square of input j.

    A Cholesky decomposition is used. While it fails because of rounding, the ridge is multiplied by ten.

    Args:
        moments: Moments of z and y.
        anchor: Solution for an infinite ridge, shape (n_out, n_in).
        ridge: Strength relative to the mean squares of the inputs; infinity gives the anchor.
        intercept: If true, fit b, and take the variance of input j as dⱼ; otherwise b is zero.
    """
    zz, yz = moments.covariances(intercept)
    anchor = anchor.to(zz.dtype)
    scale = zz.diagonal()
    # the anchor determines the weights of inputs that never vary
    scale = scale.clamp_min(max(float(scale.mean()) * 1e-6, 1e-30))
    weight = anchor
    while ridge < math.inf:
        damped = zz.clone()
        damped.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            weight = torch.cholesky_solve((yz + anchor * (ridge * scale)).T, factor).T
            break
        ridge = max(ridge, RIDGES[0]) * 10 if ridge < 1e3 else math.inf
    bias = (moments.y - weight @ moments.z) / moments.mass if intercept else torch.zeros_like(moments.y)
    return Fit(weight, bias, ridge)


def fit(
    fitted: Moments,
    tuning: Moments,
    anchor: torch.Tensor,
    intercept: bool,
    metric: torch.Tensor | None = None,
    ridges: Iterable[float] = RIDGES,
) -> Fit:
    """Select the ridge with the smallest error on the tuning tokens, then solve on all tokens with that ridge.

    Args:
        fitted: Moments from which every ridge's solution is computed.
        tuning: Moments of other tokens, on which these solutions are compared.
        anchor: Solution for an infinite ridge, shape (n_out, n_in).
        intercept: If true, fit b.
        metric: Metric of the error, as in `Moments.error`.
        ridges: Candidate ridges.
    """

    def error(ridge: float) -> float:
        found = solve(fitted, anchor, ridge, intercept)
        return tuning.error(found.weight, found.bias, metric)

    return solve(fitted + tuning, anchor, min(ridges, key=error), intercept)
