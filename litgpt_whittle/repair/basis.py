"""Which directions of the teacher's residual stream the student's channels carry.

Either kept coordinates, as a plain slice has them, or the directions that matter most to what reads the stream. An
RMSNorm does not care about rotations of its input once its weight is folded into what reads it (SliceGPT, arXiv
2401.15024), so a student can carry any orthonormal directions and stay a stock litgpt model. A LayerNorm subtracts the
mean over channels first. Its student gets directions within the channels' zero-mean subspace, mapped into its own
zero-mean subspace, where subtracting the mean changes nothing: it loses one direction and keeps its kind of norm.
"""

from __future__ import annotations

import torch
from litgpt.config import Config
from litgpt.model import Block
from torch import nn

from litgpt_whittle.index_plan import axes_of
from litgpt_whittle.least_squares import Moments


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
    def principal(cls, directions: torch.Tensor, n_embd: int, centred: bool) -> Basis:
        """The leading directions.

        Args:
            directions: What `principal_directions` gives.
            n_embd: The student's channels.
            centred: Whether the model's norms subtract the mean over channels.
        """
        if not centred:
            return cls(directions[:n_embd].float().contiguous())
        into = _zero_mean_directions(n_embd).to(directions)  # (n_embd, n_embd - 1)
        return cls((into @ directions[: n_embd - 1]).float().contiguous())

    @property
    def is_coordinates(self) -> bool:
        return self.kept is not None

    def project(self, stream: torch.Tensor) -> torch.Tensor:
        """The teacher's stream as the student's channels carry it: (…, n_embd_teacher) to (…, n_embd_student)."""
        return stream[..., self.kept] if self.kept is not None else stream @ self.matrix.T

    def turn_norm(self, teacher: nn.Module, student: nn.Module) -> None:
        """Gives a student's norm its start in a basis of directions, in which the teacher's weight is no diagonal."""
        weight = norm_weight(teacher)
        scale = 1.0 if weight is None else weight.square().mean().sqrt()
        set_norm_weight(student, scale)
        if getattr(student, "bias", None) is not None:
            # a LayerNorm's output has no mean of its own: a constant there is an intercept to readers without a bias
            student.bias.copy_(self.matrix @ teacher.bias + scale)

    def reconstruction(self, norm: nn.Module, moments: Moments) -> torch.Tensor:
        """The teacher's normalised stream from the student's, as a plain cut has it, to the best scale.

        The scale is needed because a norm over fewer channels divides by something else.

        Args:
            norm: The teacher's norm.
            moments: Of the student's normalised stream as inputs, the teacher's as outputs.

        Returns:
            R, shape (n_embd_teacher, n_embd_student), with teacher ≈ R · student.
        """
        turn = self.matrix.T.to(moments.zz.dtype)
        weight = norm_weight(norm)
        if not self.is_coordinates and weight is not None:
            weight = weight.to(turn.dtype)
            turn = turn * weight[:, None] / weight.square().mean().sqrt()
        zz, yz = moments.covariances(intercept=True)
        size = ((turn @ zz) * turn).sum()
        return turn * float((turn * yz).sum() / size) if size > 0 else turn


def principal_directions(worth: torch.Tensor, centred: bool) -> torch.Tensor:
    """Orthonormal directions of the stream, the worthiest first, shape (n_embd, n_embd).

    Args:
        worth: A symmetric form that says what a direction is worth, such as the normalised stream's covariance; shape
            (n_embd, n_embd).
        centred: Whether the model's norms subtract the mean over channels, which leaves no direction but those without
            one; the last of the directions is nothing then.
    """
    if not centred:
        return torch.linalg.eigh(worth).eigenvectors.flip(1).T
    n = len(worth)
    centring = torch.eye(n, dtype=worth.dtype, device=worth.device) - 1 / n
    # rounding leaves a trace of the mean in the directions
    return torch.linalg.eigh(centring @ worth @ centring).eigenvectors.flip(1).T @ centring


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


def affine_part(norm: nn.Module, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a norm multiplies its n channels by, and what it adds to them."""
    weight, bias = norm_weight(norm), getattr(norm, "bias", None)
    return torch.ones(n) if weight is None else weight, torch.zeros(n) if bias is None else bias.data


def is_centring(config: Config) -> bool:
    """Whether the model's norms subtract the mean over channels."""
    return config.norm_class_name == "LayerNorm"


def standardised(stream: torch.Tensor, config: Config) -> torch.Tensor:
    """The stream as a norm without weights leaves it."""
    if is_centring(config):
        stream = stream - stream.mean(-1, keepdim=True)
    return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + config.norm_eps)


def token_weights(stream: torch.Tensor, config: Config) -> torch.Tensor:
    """Return the weight of each token's error in a regression: 1 / the mean square of its stream.

    Every map reads the stream through a norm, so what counts is an error relative to the stream's size at that token.
    Pretrained models have a few tokens whose streams are a thousand times as large as the others' (massive
    activations, arXiv 2402.17762); unweighted least squares would serve these tokens alone.

    Args:
        stream: The teacher's residual stream, shape (…, n_embd).
        config: The teacher's config.

    Returns:
        Shape (…).
    """
    if is_centring(config):
        stream = stream - stream.mean(-1, keepdim=True)
    return 1 / (stream.square().mean(-1) + config.norm_eps)


def readers(block: Block, part: str) -> list[torch.Tensor]:
    """The weights of all maps of `attn` or `mlp` that read the stream, each of shape (n_out, n_embd)."""
    weights = []
    for name, weight in block.get_submodule(part).named_parameters():
        module, _, leaf = f"{part}.{name}".rpartition(".")
        if leaf == "weight" and axes_of(module)[1:] == ("n_embd",):
            weights.append(weight.data)
    return weights


class Worth:
    """How much the directions of the normalised stream matter to what reads it.

    With C the stream's covariance and G the sum of WᵀW over all readers' weights W, the leading eigenvectors of
    C^½ G C^½ are the directions that carry most of what is read. They lie within the span of C: a direction in which
    the stream never moves is worth nothing, however large the weights along it.
    """

    def __init__(self) -> None:
        self.covariance = self.gram = 0.0

    def add(self, moments: Moments, norm: nn.Module, weights: list[torch.Tensor], times: float = 1.0) -> None:
        """Adds the readers behind one norm, each norm weighing `times`.

        Args:
            moments: Of the stream as the norm would leave it without weights.
            norm: The norm.
            weights: Those of the maps behind it, each of shape (n_out, n_embd).
            times: What they count.
        """
        covariance = (moments.zz / moments.mass).double()
        scale = norm_weight(norm)
        gram = torch.zeros_like(covariance)
        for weight in weights:
            weight = (weight if scale is None else weight * scale).double()
            gram.addmm_(weight.T, weight)
        self.covariance = self.covariance + covariance
        self.gram = self.gram + gram * (times / (gram * covariance).sum().clamp_min(1e-30))

    @property
    def form(self) -> torch.Tensor:
        """C^½ G C^½, shape (n_embd, n_embd)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        return root @ self.gram @ root
