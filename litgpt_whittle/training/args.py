"""Argument groups of the commands that train, checked when they are made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from typing import Literal

import litgpt.args
import torch

from litgpt_whittle.distillation.losses import Loss
from litgpt_whittle.distillation.objective import Objective, Term
from litgpt_whittle.errors import UserError
from litgpt_whittle.registry import lookup


@dataclass
class TrainArgs(litgpt.args.TrainArgs):
    """Training-related arguments, litgpt's and some more"""

    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """How the learning rate goes on after its warm-up: down a half cosine, or it stays, and falls in the end"""
    lr_decay_fraction: float = 0.1
    """The share of the training in which it falls, with wsd (warm-up, stable, decay)"""
    tie_embeddings: bool | None = None
    """Whether the LM head is the embedding. By default as in the checkpoint that training starts from; ``false`` unties
    them, and from random weights, where the default is untied as in ``litgpt pretrain``, ``true`` ties them"""
    skip_nan: bool = False
    """Whether to go on, without an update, after a step whose loss or gradient is not finite"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lr_decay_fraction <= 1:
            raise UserError(
                f"train.lr_decay_fraction must be above 0 and at most 1, got {self.lr_decay_fraction}; 0.1 is usual"
            )


@dataclass
class RampArgs:
    """A number that changes while training goes on"""

    start: float
    """What it is at the beginning"""
    end: float
    """What it is in the end"""
    shape: Literal["linear", "cosine"] = "linear"
    """How it gets from one to the other"""
    until: float = 1.0
    """The share of the training after which it is there"""

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise UserError(f"until must be a share of the training, above 0 and at most 1, got {self.until}")

    def at(self, done: float) -> float:
        """The number when a share of the training is done."""
        way = min(done / self.until, 1.0)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + (self.end - self.start) * way


@dataclass
class HiddenArgs:
    """How far the student's residual stream is from the teacher's, layer by layer"""

    weight: float = 0.0
    """The weight, in the loss, of the stream behind each layer; 0 leaves it out"""
    attention: float = 0.0
    """The weight of what attention adds to the stream"""
    loss: Literal["mse", "cosine"] = "mse"
    """The mean squared difference, relative to the teacher's mean square in the micro-batch, or 1 - the cosine; over
    the tokens whose labels count"""
    layers: list[int] | None = None
    """Which of the student's layers, from 0; by default all"""
    projection: bool = False
    """Learn a linear map to the teacher's channels, for students that did not come from the teacher. Their layers are
    matched with those at the same depth"""

    def __post_init__(self) -> None:
        for name in ("weight", "attention"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"distill.hidden.{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def is_used(self) -> bool:
        """Whether it counts."""
        return bool(self.weight or self.attention)


@dataclass
class DistillArgs:
    """What a student learns from: loss = alpha · CE + beta · T² · loss(teacher, student).

    The defaults are the best values of arXiv 2510.07227. Each number may be a ramp: ``{start: 1.0, end: 0.2}``, with
    ``shape`` linear or cosine, and ``until``, the share of the training that it takes.
    """

    loss: str | dict[str, float | dict[str, float]] = "forward_kl"
    """Distance between the teacher's and the student's predictions, by its name in ``litgpt_whittle.losses``, or
    several with their weights: ``{forward_kl: 0.7, mse: 0.3}``; one with settings: ``{jensen_shannon: {beta: 0.1}}``,
    its ``weight`` among them"""
    alpha: float | RampArgs = 0.2
    """Weight of the cross-entropy with the true next tokens. Without effect where beta is 0: a lone cross-entropy is
    not scaled, so that such a run is what ``litgpt pretrain`` does. One difference: where micro-batches have unequal
    numbers of labels, being masked or of different lengths, a step's loss is the mean over all of its tokens, however
    they are split into micro-batches and devices, and not the mean of the micro-batches' means"""
    beta: float | RampArgs = 0.8
    """Weight of the distance to the teacher. With 0 no teacher is needed or loaded"""
    temperature: float | RampArgs = 0.9
    """Divides the logits of both before the distance is taken"""
    hidden: HiddenArgs = field(default_factory=HiddenArgs)
    """What is added to the loss for the student's residual stream"""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            for value in _ends(getattr(self, name)):
                if not 0 <= value < math.inf:
                    raise UserError(f"distill.{name} must be 0 or more, got {value}; raise it")
        if any(_at(self.alpha, done) == _at(self.beta, done) == 0 for done in (0.0, 1.0)):
            raise UserError("distill.alpha and distill.beta must not both be 0, nothing would be learned; raise one")
        for value in _ends(self.temperature):
            if not 0 < value < math.inf:
                raise UserError(f"distill.temperature must be above 0, got {value}; the paper's best is 0.9")

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher has a say at any time."""
        return any(_ends(self.beta)) or self.hidden.is_used

    def objectives(self) -> Callable[[float], Objective]:
        """From the share of the training that is done to what is then learned from.

        Raises:
            UserError: Where a loss is not known or does not take a setting.
        """
        if not self.uses_teacher:
            return lambda done: Objective()
        losses = {self.loss: 1.0} if isinstance(self.loss, str) else self.loss
        terms = tuple(term for term in (_term(name, settings) for name, settings in losses.items()) if term.weight)
        if not terms:
            raise UserError(f"distill.loss must have a loss with a weight above 0, got {self.loss}")
        numbers = (self.alpha, self.beta, self.temperature)
        return lambda done: Objective(*(_at(number, done) for number in numbers), terms)


def _term(name: str, settings: float | dict[str, float]) -> Term:
    settings = dict(settings) if isinstance(settings, dict) else {"weight": settings}
    weight = settings.pop("weight", 1.0)
    if not 0 <= weight < math.inf:
        raise UserError(f"distill.loss.{name} must have a weight of 0 or more, got {weight}")
    loss = lookup("litgpt_whittle.losses", name)
    known = list(inspect.signature(loss).parameters)[2:]
    for setting in settings:
        if setting not in known:
            raise UserError(f"distill.loss.{name} has no setting {setting!r}; it takes {', '.join(['weight', *known])}")
    if not settings:
        return Term(loss, weight)
    # with the loss's attributes, which tell what it can learn from
    loss = update_wrapper(partial(loss, **settings), loss)
    _try(name, loss, settings)
    return Term(loss, weight)


def _try(name: str, loss: Loss, settings: dict[str, float]) -> None:
    """Has a loss refuse its settings before anything else runs."""
    even = torch.full((1, 2), -math.log(2))
    try:
        loss(even, even)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"distill.loss.{name} cannot be taken with {settings} ({error}); change them") from None


def _ends(number: float | RampArgs) -> tuple[float, float]:
    return (number.start, number.end) if isinstance(number, RampArgs) else (number, number)


def _at(number: float | RampArgs, done: float) -> float:
    return number.at(done) if isinstance(number, RampArgs) else number
