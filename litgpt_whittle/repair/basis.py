"""Basis of the student's residual stream: directions of the teacher's residual stream that student channels represent.

The basis is either a subset of the teacher's channels, as in a plain slice, or the directions that matter most to the
input projections. An RMSNorm commutes with rotations of its input once its weight is folded into the projections after
it (SliceGPT, arXiv 2401.15024), so a student can use any orthonormal directions and stay a stock litgpt model. A
LayerNorm first subtracts the mean over channels. Its student uses directions of the teacher's zero-mean subspace. They
are mapped into the student's zero-mean subspace, where subtracting the mean changes nothing. The student thus loses one
direction, and its norm stays a LayerNorm.
"""

from __future__ import annotations

import torch
from litgpt.config import Config
from litgpt.model import Block
from torch import nn

from litgpt_whittle.index_plan import axes_of
from litgpt_whittle.least_squares import Moments, products
from litgpt_whittle.tensors import in_sums_dtype


class Basis:
    """Linear map from the teacher's residual stream to the student's.

    Args:
        matrix: The student's channels as combinations of the teacher's, shape (n_embd_student, n_embd_teacher). Its
            rows are orthonormal, except for the direction that a LayerNorm loses.
        kept: Indices of the teacher's channels if the student's channels are a subset of them, otherwise None.
    """

    def __init__(self, matrix: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        self.matrix, self.kept = matrix, kept

    @classmethod
    def coordinates(cls, kept: torch.Tensor, n_embd: int) -> Basis:
        """Create the basis that selects the teacher's channels `kept`."""
        return cls(torch.eye(n_embd, device=kept.device)[kept], kept)

    @classmethod
    def principal(cls, directions: torch.Tensor, n_embd: int, centred: bool) -> Basis:
        """Create the basis of the leading directions.

        Args:
            directions: Output of `principal_directions`.
            n_embd: Number of the student's channels.
            centred: True if the model's norms subtract the mean over channels.
        """
        if not centred:
            return cls(directions[:n_embd].float().contiguous())
        into = _zero_mean_directions(n_embd).to(directions)  # (n_embd, n_embd - 1)
        return cls((into @ directions[: n_embd - 1]).float().contiguous())

    @property
    def is_coordinates(self) -> bool:
        """True if the student's channels are a subset of the teacher's."""
        return self.kept is not None

    @property
    def is_whole(self) -> bool:
        """True if the student keeps all of the teacher's channels."""
        return self.kept is not None and len(self.kept) == self.matrix.shape[1]

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        """Project the teacher's hidden states to the student's channels: (…, n_embd_teacher) to (…, n_embd_student)."""
        return stream[..., self.kept] if self.kept is not None else stream @ self.matrix.T

    def turn_norm(self, teacher: nn.Module, student: nn.Module) -> None:
        """Initialise a student's norm in a basis of directions, with the RMS of the teacher's weight in each channel.

        In such a basis, the teacher's weight is a full matrix, which a norm cannot represent. The fit of the input
        projections compensates for the difference.
        """
        weight = norm_weight(teacher)
        scale = 1.0 if weight is None else weight.square().mean().sqrt()
        set_norm_weight(student, scale)
        bias = getattr(student, "bias", None)
        if bias is not None:
            # a LayerNorm's output has zero mean; adding a constant gives later projections without a bias an intercept
            bias.copy_(self.matrix @ teacher.get_parameter("bias") + scale)

    def reconstruction(self, norm: nn.Module, moments: Moments) -> torch.Tensor:
        """Return the map from the student's normalised hidden states to the teacher's, before any fit.

        The map is the transposed basis times a factor, because a norm over fewer channels divides by a different value.
        The factor minimises the squared error.

        Args:
            norm: The teacher's norm.
            moments: Moments with the student's normalised hidden states as inputs and the teacher's as outputs.

        Returns:
            R, shape (n_embd_teacher, n_embd_student), with teacher ≈ R · student.
        """
        turn = self.matrix.T.to(moments.zz.dtype)
        weight = norm_weight(norm)
        if not self.is_coordinates and weight is not None:
            weight = weight.to(turn.dtype)
            # a padded teacher's norm is zero before a sub-layer that it lacks
            turn = turn * weight[:, None] / weight.square().mean().sqrt().clamp_min(torch.finfo(weight.dtype).tiny)
        zz, yz = moments.covariances(intercept=True)
        size = ((turn @ zz) * turn).sum()
        return turn * float((turn * yz).sum() / size) if size > 0 else turn


def principal_directions(importance: torch.Tensor, centred: bool) -> torch.Tensor:
    """Return orthonormal directions of the residual stream, the most important first, shape (n_embd, n_embd).

    Args:
        importance: Symmetric matrix M that scores a direction v by vᵀMv, such as `DirectionImportance.form`, shape
            (n_embd, n_embd).
        centred: True if the model's norms subtract the mean over channels. All directions then have zero mean, and the
            last one is zero.
    """
    if not centred:
        return torch.linalg.eigh(importance).eigenvectors.flip(1).T
    n = len(importance)
    centring = torch.eye(n, dtype=importance.dtype, device=importance.device) - 1 / n
    # centre again, since rounding leaves small means in the directions
    return torch.linalg.eigh(centring @ importance @ centring).eigenvectors.flip(1).T @ centring


def _zero_mean_directions(n: int) -> torch.Tensor:
    """Return a deterministic orthonormal basis of the vectors whose entries sum to zero, shape (n, n - 1)."""
    # the columns of the discrete cosine transform except the constant one
    i = torch.arange(n, dtype=torch.float64)[:, None] + 0.5
    k = torch.arange(1, n, dtype=torch.float64)
    return torch.cos(torch.pi * i * k / n) * (2 / n) ** 0.5


def norm_weight(norm: nn.Module) -> torch.Tensor | None:
    """Return the factor of each channel in a norm, or None if the norm has no weight."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    return weight.data + 1 if getattr(norm, "add_unit_offset", False) else weight.data


def set_norm_weight(norm: nn.Module, weight: torch.Tensor | float) -> None:
    """Set the factor of each channel in a norm, in place; a norm without a weight is not changed."""
    own = getattr(norm, "weight", None)
    if own is not None:
        own.data.fill_(0).add_(weight - 1 if getattr(norm, "add_unit_offset", False) else weight)


def scale_norm_weight(norm: nn.Module, by: torch.Tensor) -> None:
    """Multiply the factor of each channel in a norm, in place; a norm without a weight is not changed."""
    weight = norm_weight(norm)
    if weight is not None:
        set_norm_weight(norm, weight * by.to(weight.dtype))


def affine_part(norm: nn.Module, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight and bias of a norm over n channels, each of shape (n,); ones or zeros if missing."""
    weight, bias = norm_weight(norm), getattr(norm, "bias", None)
    return torch.ones(n) if weight is None else weight, torch.zeros(n) if bias is None else bias.data


def is_centring(config: Config) -> bool:
    """Return whether the model's norms subtract the mean over channels."""
    return config.norm_class_name == "LayerNorm"


def standardised(stream: torch.Tensor, config: Config) -> torch.Tensor:
    """Normalise hidden states, shape (…, n_embd), as a norm without weights does."""
    if is_centring(config):
        stream = stream - stream.mean(-1, keepdim=True)
    return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + config.norm_eps)


def token_weights(stream: torch.Tensor, config: Config) -> torch.Tensor:
    """Return the weight of each token's error in a regression: 1 / (mean square of its hidden state).

    Every input projection follows a norm, so errors matter relative to the size of the token's hidden state. In
    pretrained models, a few tokens have hidden states a thousand times larger than usual (massive activations, arXiv
    2402.17762). These tokens would dominate unweighted least squares.

    Args:
        stream: The teacher's residual stream, shape (…, n_embd).
        config: The teacher's config.

    Returns:
        Weights, shape (…).
    """
    if is_centring(config):
        stream = stream - stream.mean(-1, keepdim=True)
    return 1 / (stream.square().mean(-1) + config.norm_eps)


def readers(block: Block, part: str) -> list[torch.Tensor]:
    """Return the weights of all input projections of `attn` or `mlp`, each of shape (n_out, n_embd)."""
    weights = []
    for name, weight in block.get_submodule(part).named_parameters():
        module, _, leaf = f"{part}.{name}".rpartition(".")
        if leaf == "weight" and axes_of(module)[1:] == ("n_embd",):
            weights.append(weight.data)
    return weights


class DirectionImportance:
    """Importance of directions of the normalised hidden states for the input projections.

    Let C be the uncentred covariance of these states, and G the weighted sum of WᵀW over the weights W of all input
    projections. The leading eigenvectors of C^½ G C^½ are the directions that contribute most to the projections'
    outputs. They lie in the span of C: a direction in which the states are always zero has no importance, however large
    the weights are.
    """

    def __init__(self) -> None:
        self.covariance = self.gram = torch.zeros(())

    def add(self, moments: Moments, norm: nn.Module, weights: list[torch.Tensor], times: float = 1.0) -> None:
        """Add the input projections after one norm.

        Args:
            moments: Moments of the hidden states, normalised without the norm's weights.
            norm: The norm.
            weights: Weights of the projections after the norm, each of shape (n_out, n_embd).
            times: Total weight of these projections, relative to those after other norms.
        """
        covariance = in_sums_dtype(moments.zz / moments.mass)
        scale = norm_weight(norm)
        gram = torch.zeros_like(covariance)
        for weight in weights:
            weight = weight if scale is None else weight * scale
            gram += products(weight, weight)
        self.covariance = self.covariance + covariance
        self.gram = self.gram + gram * (times / (gram * covariance).sum().clamp_min(1e-30))

    @property
    def form(self) -> torch.Tensor:
        """The matrix C^½ G C^½, shape (n_embd, n_embd)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        return root @ self.gram @ root
