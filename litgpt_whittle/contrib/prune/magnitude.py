"""Magnitude pruning: drop the smallest weights."""

from __future__ import annotations

import torch

from litgpt_whittle.contrib.prune.base import Pruner
from litgpt_whittle.least_squares import Moments


class Magnitude(Pruner):
    """Drops the weights with the smallest absolute values; without a pattern, it compares all weights of a layer."""

    reads_data = False

    def prune(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """Return the pruned weight; the moments are not used."""
        return weight.masked_fill(self.sparsity.dropped(weight.abs()), 0)
