"""SparseGPT: the weights to the right of a dropped weight compensate for it (arXiv 2301.00774)."""

from __future__ import annotations

import torch

from litgpt_whittle.contrib.prune.base import Pruner, Sparsity, lowest
from litgpt_whittle.errors import UserError
from litgpt_whittle.least_squares import Moments
from litgpt_whittle.setting_checks import (
    check_positive,
    is_number,
)


class SparseGPT(Pruner):
    """Prunes input by input from left to right; each dropped weight updates the remaining weights to its right.

    With H = Σ x xᵀ of the inputs from j on, dropping w_j costs w_j² / [H⁻¹]_jj, and the optimal update is
    −w_j / [H⁻¹]_jj · H⁻¹_j (Optimal Brain Surgeon). One factor holds all of these inverses: with H⁻¹ = Uᵀ U of all
    inputs, U upper triangular, [H⁻¹]_jj is U_jj² and H⁻¹_j is U_jj · U_j (section 3.3).

    Args:
        sparsity: Sparsity of each block of inputs, among all of its weights; a pattern holds for each output.
        damp: Added to the diagonal of H, relative to its mean.
        block_size: Inputs per block. Weights are compared within a block; later blocks are updated at its end.
    """

    def __init__(self, sparsity: Sparsity, damp: float = 0.01, block_size: int = 128) -> None:
        super().__init__(sparsity)
        if not (is_number(damp) and damp > 0):
            raise UserError(f"method.damp must be above 0, got {damp!r}; 0.01 is the paper's value")
        check_positive("method", block_size=block_size)
        self.damp = damp
        # blocks never split a group
        self.block_size = max(block_size // sparsity.group, 1) * sparsity.group

    def prune(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """Return the pruned weight, with the remaining weights updated."""
        assert moments is not None
        factor = self._factor(moments)
        w = weight.to(factor.dtype, copy=True)
        n_out, n_in = w.shape
        for begin in range(0, n_in, self.block_size):
            end = min(begin + self.block_size, n_in)
            # the rounded counts of the blocks add up to that of the whole layer
            n_drop = round(self.sparsity.share * n_out * end) - round(self.sparsity.share * n_out * begin)
            errors = self._prune_columns(w[:, begin:end], factor[begin:end, begin:end], n_drop)
            w[:, end:] -= errors @ factor[begin:end, end:]
        return w.to(weight.dtype)

    def _factor(self, moments: Moments) -> torch.Tensor:
        """Return U with Uᵀ U = H⁻¹, shape (n_in, n_in); damping grows tenfold until H is invertible."""
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
        """Prune a block of inputs in place.

        Args:
            w: The block's weights, shape (n_out, n).
            factor: The block's part of U, shape (n, n).
            n_drop: Number of weights to drop, without a pattern.

        Returns:
            Coefficients of the dropped weights, shape (n_out, n); their product with U updates weights to the right.
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
            w[:, j].masked_fill_(drop[:, j], 0)  # exactly 0 despite rounding; indexing by a mask would wait for the GPU
        return errors
