"""SparseGPT: what goes is made up for by the weights to its right (arXiv 2301.00774)."""

from __future__ import annotations

import torch

from litgpt_whittle.errors import UserError
from litgpt_whittle.least_squares import Moments
from litgpt_whittle.pruners.base import Pruner, Sparsity, lowest
from litgpt_whittle.searching.args import check_positive, is_number


class SparseGPT(Pruner):
    """Goes through the inputs from left to right; each weight that goes changes those to its right that stay.

    With H = Σ x xᵀ of the inputs from j on, dropping w_j costs w_j² / [H⁻¹]_jj and is best made up for by
    −w_j / [H⁻¹]_jj · H⁻¹_j (optimal brain surgery). All these inverses are in one factor: with H⁻¹ = Uᵀ U of all
    inputs, U upper triangular, [H⁻¹]_jj is U_jj² and H⁻¹_j is U_jj · U_j (section 3.3).

    Args:
        sparsity: How many go: of a block of inputs, among all its weights; or of every m inputs, for each output.
        damp: Added to the diagonal of H, relative to its mean.
        block_size: Inputs whose weights are compared with each other; those to the right are changed at the end of one.
    """

    def __init__(self, sparsity: Sparsity, damp: float = 0.01, block_size: int = 128) -> None:
        super().__init__(sparsity)
        if not (is_number(damp) and damp > 0):
            raise UserError(f"method.damp must be above 0, got {damp!r}; 0.01 is the paper's")
        check_positive("method", block_size=block_size)
        self.damp = damp
        # a group is never torn apart
        self.block_size = max(block_size // sparsity.group, 1) * sparsity.group

    def prune(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """What remains, adapted."""
        assert moments is not None
        factor = self._factor(moments)
        w = weight.to(factor.dtype, copy=True)
        n_out, n_in = w.shape
        for begin in range(0, n_in, self.block_size):
            end = min(begin + self.block_size, n_in)
            # so that shares of blocks, rounded, add up to the share of the whole
            n_drop = round(self.sparsity.share * n_out * end) - round(self.sparsity.share * n_out * begin)
            errors = self._prune_columns(w[:, begin:end], factor[begin:end, begin:end], n_drop)
            w[:, end:] -= errors @ factor[begin:end, end:]
        return w.to(weight.dtype)

    def _factor(self, moments: Moments) -> torch.Tensor:
        """U with Uᵀ U = H⁻¹, shape (n_in, n_in); the damping grows by tens until H has an inverse."""
        hessian = moments.zz / moments.mass
        scale = float(hessian.diagonal().mean()) or 1.0
        damp = self.damp
        while True:
            damped = hessian + damp * scale * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
            damp *= 10

    def _prune_columns(self, w: torch.Tensor, factor: torch.Tensor, n_drop: int) -> torch.Tensor:
        """Prunes a block of inputs in place.

        Args:
            w: Their weights, shape (n_out, n).
            factor: Their part of U, shape (n, n).
            n_drop: How many of them go, where there is no pattern.

        Returns:
            For each weight what its loss takes from those to the right, in units of U's row, shape (n_out, n).
        """
        pattern, diagonal = self.sparsity.pattern, factor.diagonal()
        size = self.sparsity.group if pattern else w.shape[1]
        errors, drop = torch.zeros_like(w), torch.zeros_like(w, dtype=torch.bool)
        for j in range(w.shape[1]):
            if j % size == 0:
                group = slice(j, j + size)
                costs = (w[:, group] / diagonal[group]).square()
                if pattern:
                    drop[:, group] = lowest(costs, size - pattern[0])
                else:
                    drop[:, group] = lowest(costs.flatten(), n_drop).view_as(costs)
            errors[:, j] = torch.where(drop[:, j], w[:, j] / diagonal[j], 0)
            w[:, j:] -= torch.outer(errors[:, j], factor[j, j:])
            w[drop[:, j], j] = 0  # which rounding may have missed
        return errors
