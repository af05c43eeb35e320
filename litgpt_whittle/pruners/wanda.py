"""Wanda: weights go by their size times that of what they read (arXiv 2306.11695)."""

from __future__ import annotations

import torch

from litgpt_whittle.least_squares import Moments
from litgpt_whittle.pruners.base import Pruner


class Wanda(Pruner):
    """The weights of the smallest |W_ij| · ‖x_j‖₂ of each output go; those that stay are not changed (equation 1)."""

    def prune(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """What remains."""
        assert moments is not None
        scores = weight.abs() * moments.zz.diagonal().sqrt()
        return weight.masked_fill(self.sparsity.dropped(scores, per_row=True), 0)
