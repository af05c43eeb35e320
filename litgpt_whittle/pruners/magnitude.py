"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

import torch

from litgpt_whittle.least_squares import Moments
from litgpt_whittle.pruners.base import Pruner


class Magnitude(Pruner):
    """The weights of the smallest absolute value among all of a map go (without a pattern)."""

    reads_data = False

    def prune(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """What remains; the moments are not looked at."""
        return weight.masked_fill(self.sparsity.dropped(weight.abs()), 0)
