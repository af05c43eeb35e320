"""Which directions of the teacher's residual stream the student's channels carry.

Either kept coordinates, as a plain slice has them, or the directions that matter most to what reads the stream. An
RMSNorm does not care about rotations of its input once its weight is folded into what reads it (SliceGPT, arXiv
2401.15024), so a student can carry any orthonormal directions and stay a stock litgpt model. A LayerNorm subtracts the
mean over channels first. Its student gets directions within the channels' zero-mean subspace, mapped into its own
zero-mean subspace, where subtracting the mean changes nothing: it loses one direction and keeps its kind of norm.
"""

from __future__ import annotations

import torch
from torch import nn


class Basis:
    """The map from the teacher's stream to the student's.

    Args:
        matrix: The student's channels as combinations of the teacher's, shape (n_embd_student, n_embd_teacher), with
            orthonormal rows (but for the direction that a LayerNorm loses).
        kept: The teacher's channels, where the student's are a choice of them.
    """

    def __init__(self, matrix: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        self.matrix, self.kept = matrix, kept

    @classmethod
    def coordinates(cls, kept: torch.Tensor, n_embd: int) -> Basis:
        """The teacher's channels `kept`."""
        return cls(torch.eye(n_embd, device=kept.device)[kept], kept)

    @classmethod
    def principal(cls, worth: torch.Tensor, n_embd: int, centred: bool) -> Basis:
        """The leading directions.

        Args:
            worth: A symmetric form that says what a direction is worth, such as the normalised stream's covariance;
                shape (n_embd_teacher, n_embd_teacher).
            n_embd: The student's channels.
            centred: Whether the model's norms subtract the mean over channels.
        """
        n = worth.shape[0]
        if not centred:
            return cls(torch.linalg.eigh(worth).eigenvectors[:, -n_embd:].flip(1).T.float().contiguous())
        centring = torch.eye(n, dtype=worth.dtype, device=worth.device) - 1 / n
        directions = torch.linalg.eigh(centring @ worth @ centring).eigenvectors[:, -(n_embd - 1) :].flip(1)
        into = _zero_mean_directions(n_embd).to(directions)  # (n_embd, n_embd - 1)
        # rounding leaves a trace of the mean in the directions
        return cls((into @ (directions.T @ centring)).float().contiguous())

    @property
    def is_coordinates(self) -> bool:
        return self.kept is not None

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        """The teacher's stream as the student's channels carry it: (…, n_embd_teacher) to (…, n_embd_student)."""
        return stream[..., self.kept] if self.kept is not None else stream @ self.matrix.T


def _zero_mean_directions(n: int) -> torch.Tensor:
    """An orthonormal basis of the vectors whose entries sum to zero, shape (n, n - 1), the same at every call."""
    # the columns of the discrete cosine transform but for the constant one
    i = torch.arange(n, dtype=torch.float64)[:, None] + 0.5
    k = torch.arange(1, n, dtype=torch.float64)
    return torch.cos(torch.pi * i * k / n) * (2 / n) ** 0.5


def norm_weight(norm: nn.Module) -> torch.Tensor | None:
    """What a norm multiplies its channels by; None where it has no weight."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    return weight.data + 1 if getattr(norm, "add_unit_offset", False) else weight.data


def set_norm_weight(norm: nn.Module, weight: torch.Tensor | float) -> None:
    """Makes a norm multiply its channels by `weight`, in place; a norm without a weight stays as it is."""
    if getattr(norm, "weight", None) is not None:
        norm.weight.data.fill_(0).add_(weight - 1 if getattr(norm, "add_unit_offset", False) else weight)
