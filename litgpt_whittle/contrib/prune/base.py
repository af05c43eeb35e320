"""Base class of pruners, which prune a linear layer given the moments of its inputs."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from litgpt_whittle.errors import UserError
from litgpt_whittle.least_squares import Moments


@dataclass(frozen=True)
class Sparsity:
    """Sparsity of a linear layer: a fraction of zeros, or an n:m pattern that keeps n of every m weights per output."""

    share: float = 0.5
    """Fraction of zeros among all weights"""
    pattern: tuple[int, int] | None = None
    """n and m, such as 2 and 4 for 2:4 kernels; None for unstructured sparsity"""

    @classmethod
    def parse(cls, sparsity: float | None, pattern: str | int | None) -> Sparsity:
        """Parse the command line's options; if both are None, the sparsity is 0.5.

        Raises:
            UserError: If both are given, or one is invalid.
        """
        if sparsity is not None and pattern is not None:
            raise UserError(
                f"sparsity and pattern both set the share of pruned weights, got {sparsity} and {pattern}; set only one"
            )
        if pattern is None:
            share = cls.share if sparsity is None else sparsity
            if not 0 < share < 1:
                raise UserError(f"sparsity must lie between 0 and 1, got {share}; 0.5 makes half of the weights zero")
            return cls(share)
        if isinstance(pattern, int):  # YAML reads 2:4 without quotes as two minutes and four seconds
            pattern = "{}:{}".format(*divmod(pattern, 60))
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        n, m = map(int, found.groups()) if found else (0, 0)
        if not 0 < n < m:
            raise UserError(f"pattern must be N:M (keep N of every M) with 0 < N < M, got {pattern!r}; try 2:4")
        return cls((m - n) / m, (n, m))

    @property
    def group(self) -> int:
        """Inputs per group of the pattern; 1 without a pattern."""
        return self.pattern[1] if self.pattern else 1

    def dropped(self, scores: torch.Tensor, per_row: bool = False) -> torch.Tensor:
        """Return the mask of the weights with the lowest scores, to drop exactly as many as the sparsity requires.

        Args:
            scores: Shape (n_out, n_in). With a pattern, n_in is a multiple of m.
            per_row: Without a pattern, compare the weights of each output separately, instead of all together.

        Returns:
            True for weights to drop, shape (n_out, n_in).
        """
        if self.pattern:
            n, m = self.pattern
            return lowest(scores.unflatten(1, (-1, m)), m - n).flatten(1)
        if per_row:
            return lowest(scores, round(self.share * scores.shape[1]))
        return lowest(scores.flatten(), round(self.share * scores.numel())).view_as(scores)

    def __str__(self) -> str:
        return "{}:{}".format(*self.pattern) if self.pattern else f"{self.share:g}"


def lowest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Return a mask of the k lowest entries along the last dimension; ties are broken arbitrarily."""
    places = scores.topk(k, dim=-1, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, True)


class Pruner(ABC):
    """Method that chooses the weights to drop, and may update the remaining ones.

    A subclass takes its settings as keyword arguments after `sparsity`.

    Args:
        sparsity: The sparsity of each linear layer.
    """

    reads_data = True
    """True if the pruner needs the moments of the inputs"""

    def __init__(self, sparsity: Sparsity) -> None:
        self.sparsity = sparsity

    @abstractmethod
    def prune(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """Prune a linear layer.

        Args:
            weight: The layer's weight, shape (n_out, n_in), float32; it is not modified.
            moments: Moments of the inputs over at least one token; may be None if `reads_data` is false.

        Returns:
            The pruned weight, of the same shape and type, with exact zeros.
        """
