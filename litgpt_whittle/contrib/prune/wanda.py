"""Wanda: drop the smallest products of weight magnitude and input norm (arXiv 2306.11695)."""

from __future__ import annotations

import torch

from litgpt_whittle.contrib.prune.base import Pruner
from litgpt_whittle.least_squares import Moments


class Wanda(Pruner):
    """Drops each output's weights with the smallest |W_ij| · ‖x_j‖₂, without updating the others (equation 1)."""

    def prune(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """Return the pruned weight."""
        assert moments is not None
        scores = weight.abs() * moments.zz.diagonal().sqrt()
        return weight.masked_fill(self.sparsity.dropped(scores, per_row=True), 0)
