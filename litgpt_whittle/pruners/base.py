"""What every pruner is: shown a linear map and the moments of what it reads, it says what remains of the map."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from litgpt_whittle.errors import UserError
from litgpt_whittle.least_squares import Moments


@dataclass(frozen=True)
class Sparsity:
    """How many of a linear map's weights become zero: a share of them, or all but n of every m along its inputs."""

    share: float = 0.5
    """Zeros among all weights"""
    pattern: tuple[int, int] | None = None
    """n and m, which 2:4 kernels want as 2 and 4; None where the zeros may lie anywhere"""

    @classmethod
    def parse(cls, sparsity: float | None, pattern: str | int | None) -> Sparsity:
        """Reads the command line's two ways to say it; one half where it says neither.

        Raises:
            UserError: If it says both, or one that makes no sense.
        """
        if sparsity is not None and pattern is not None:
            raise UserError(
                f"sparsity and pattern both say how many weights go, got {sparsity} and {pattern}; leave one out"
            )
        if pattern is None:
            share = cls.share if sparsity is None else sparsity
            if not 0 < share < 1:
                raise UserError(f"sparsity must lie between 0 and 1, got {share}; 0.5 makes half of the weights zero")
            return cls(share)
        if isinstance(pattern, int):  # YAML takes 2:4 without quotes for two minutes and four seconds
            pattern = "{}:{}".format(*divmod(pattern, 60))
        found = re.fullmatch(r"(\d+):(\d+)", pattern)
        n, m = map(int, found.groups()) if found else (0, 0)
        if not 0 < n < m:
            raise UserError(f"pattern must be N:M, N kept of every M, with 0 < N < M, got {pattern!r}; try 2:4")
        return cls((m - n) / m, (n, m))

    @property
    def group(self) -> int:
        """How many inputs belong together; 1 without a pattern."""
        return self.pattern[1] if self.pattern else 1

    def dropped(self, scores: torch.Tensor, per_row: bool = False) -> torch.Tensor:
        """Which weights go: those of the lowest scores, exactly as many as it says.

        Args:
            scores: Shape (n_out, n_in). With a pattern, n_in is a multiple of m.
            per_row: Without a pattern, weights of one output are compared with each other, instead of all.

        Returns:
            True where a weight goes, shape (n_out, n_in).
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
    """True at the k lowest entries along the last dimension; of equal ones, any."""
    places = scores.topk(k, dim=-1, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, True)


class Pruner(ABC):
    """Chooses the weights that go, and may change those that stay. Settings are keyword arguments after the sparsity.

    Args:
        sparsity: How many go.
    """

    reads_data = True
    """Whether it needs to know what the maps read"""

    def __init__(self, sparsity: Sparsity) -> None:
        self.sparsity = sparsity

    @abstractmethod
    def prune(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """Prunes a linear map.

        Args:
            weight: Shape (n_out, n_in), float32, left as it is.
            moments: Of its inputs, at least one token's; None may be given to one that reads no data.

        Returns:
            The pruned weight, of the same shape and type, with exact zeros.
        """
