"""Argument groups of distillation objectives."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from typing import Literal

import torch

from litgpt_whittle.distillation.losses import Loss
from litgpt_whittle.distillation.objective import Objective, Term
from litgpt_whittle.errors import UserError
from litgpt_whittle.registry import lookup


@dataclass
class RampArgs:
    """A value that changes during training"""

    start: float
    """Value at the start of training"""
    end: float
    """Value at the end of the ramp and after it"""
    shape: Literal["linear", "cosine"] = "linear"
    """Interpolation between start and end"""
    until: float = 1.0
    """Fraction of training after which the ramp ends"""

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise UserError(
                f"until must be a fraction of the training, above 0 and at most 1, got {self.until}; 1 is the default"
            )

    def at(self, done: float) -> float:
        """Return the value at the completed fraction `done` of training."""
        way = min(done / self.until, 1.0)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + (self.end - self.start) * way


@dataclass
class HiddenArgs:
    """Layer-wise loss between the residual streams of student and teacher"""

    weight: float = 0.0
    """Weight of the loss on the residual stream after each layer, averaged over the layers; 0 disables it"""
    attention: float = 0.0
    """Weight of the same loss on the attention outputs, in layers that have attention; 0 disables it"""
    loss: Literal["mse", "cosine"] = "mse"
    """``mse``: squared difference relative to the squared norm of the teacher's hidden state at the same token;
    ``cosine``: 1 - cosine similarity. Averaged over the tokens whose labels count"""
    layers: list[int] | None = None
    """Student layers to match, counted from 0; by default all"""
    projection: bool = False
    """If true, learn a linear map to the teacher's channels, for students that were not extracted from the teacher;
    layers are matched by relative depth"""

    def __post_init__(self) -> None:
        for name in ("weight", "attention"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"distill.hidden.{name} must be 0 or more, got {getattr(self, name)}; raise it")

    @property
    def is_used(self) -> bool:
        """True if any weight is above 0."""
        return bool(self.weight or self.attention)


@dataclass
class DistillArgs:
    """Distillation objective: loss = alpha · CE + beta · T² · loss(teacher, student).

    The defaults are the best values of arXiv 2510.07227. Each number may be a ramp: ``{start: 1.0, end: 0.2}``, with
    ``shape`` linear or cosine, and ``until``, the fraction of training that the ramp takes.
    """

    loss: str | dict[str, float | dict[str, float]] = "forward_kl"
    """Distance between the teacher's and the student's predictions: a name in ``litgpt_whittle.losses``, or several
    with weights: ``{forward_kl: 0.7, mse: 0.3}``, or with settings, including ``weight``:
    ``{jensen_shannon: {beta: 0.1}}``"""
    alpha: float | RampArgs = 0.2
    """Weight of the cross-entropy with the true next tokens. Ignored without a teacher (beta 0 and no hidden loss): a
    lone cross-entropy is not scaled, so that such a run matches ``litgpt pretrain``. One difference: if micro-batches
    have unequal numbers of labels, through masking or different lengths, a step's loss is the mean over all of its
    tokens, independent of the split into micro-batches and devices, not the mean of the micro-batches' means"""
    beta: float | RampArgs = 0.8
    """Weight of the distance to the teacher. With 0 and no hidden loss, no teacher is needed or loaded"""
    temperature: float | RampArgs = 0.9
    """Divides both models' logits before the distance is computed"""
    hidden: HiddenArgs = field(default_factory=HiddenArgs)
    """Loss on the student's residual stream, added to the objective"""
    head: Literal["chunked", "liger"] = "chunked"
    """Computation of LM head and losses in training. ``chunked``: in chunks of tokens, for all losses; ``liger``: by
    Liger's kernels for NVIDIA GPUs, for forward_kl and the cross-entropy only"""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            for value in _ends(getattr(self, name)):
                if not 0 <= value < math.inf:
                    raise UserError(f"distill.{name} must be 0 or more, got {value}; raise it")
        if any(_at(self.alpha, done) == _at(self.beta, done) == 0 for done in (0.0, 1.0)):
            raise UserError(
                "distill.alpha and distill.beta must not both be 0 at the start or the end of training, since nothing "
                "would be learned; raise one"
            )
        for value in _ends(self.temperature):
            if not 0 < value < math.inf:
                raise UserError(f"distill.temperature must be above 0, got {value}; 0.9 is the default")

    @property
    def uses_teacher(self) -> bool:
        """True if the loss depends on the teacher at any time of the training."""
        return any(_ends(self.beta)) or self.hidden.is_used

    @property
    def first_objective(self) -> Objective:
        """The objective at the beginning of training."""
        return self.objectives()(0.0)

    def objectives(self) -> Callable[[float], Objective]:
        """Return a function that maps the completed fraction of training to the objective.

        Raises:
            UserError: If a loss is unknown or does not accept a setting.
        """
        if not self.uses_teacher:
            return lambda done: Objective()
        losses = {self.loss: 1.0} if isinstance(self.loss, str) else self.loss
        terms = tuple(term for term in (_term(name, settings) for name, settings in losses.items()) if term.weight)
        if not terms:
            raise UserError(f"distill.loss must have a loss with a weight above 0, got {self.loss}; raise one")
        alpha, beta, temperature = self.alpha, self.beta, self.temperature
        return lambda done: Objective(_at(alpha, done), _at(beta, done), _at(temperature, done), terms)


def _term(name: str, settings: float | dict[str, float]) -> Term:
    """Return the loss of this name with its weight, or with its settings, which may include the weight."""
    settings = dict(settings) if isinstance(settings, dict) else {"weight": settings}
    weight = settings.pop("weight", 1.0)
    if not 0 <= weight < math.inf:
        raise UserError(f"distill.loss.{name} must have a weight of 0 or more, got {weight}; raise it")
    loss = lookup("litgpt_whittle.losses", name)
    known = list(inspect.signature(loss).parameters)[2:]
    for setting in settings:
        if setting not in known:
            raise UserError(f"distill.loss.{name} has no setting {setting!r}; it takes {', '.join(['weight', *known])}")
    if not settings:
        return Term(loss, weight)
    # keeps the loss's attributes `on_logits` and `is_linear`
    loss = update_wrapper(partial(loss, **settings), loss)
    _try(name, loss, settings)
    return Term(loss, weight)


def _try(name: str, loss: Loss, settings: dict[str, float]) -> None:
    """Call a loss once, so that invalid settings fail before anything else runs."""
    even = torch.full((1, 2), -math.log(2))
    try:
        loss(even, even)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"distill.loss.{name} cannot be computed with {settings} ({error}); change these settings"
        ) from None


def _ends(number: float | RampArgs) -> tuple[float, float]:
    """Return the value at the start and at the end of training."""
    return (number.start, number.end) if isinstance(number, RampArgs) else (number, number)


def _at(number: float | RampArgs, done: float) -> float:
    return number.at(done) if isinstance(number, RampArgs) else number
