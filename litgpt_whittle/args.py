"""Argument groups of the commands that train, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from litgpt_whittle.errors import UserError
from litgpt_whittle.head import Objective
from litgpt_whittle.registry import lookup


@dataclass
class DistillArgs:
    """What a student learns from: loss = alpha · CE + beta · T² · loss(teacher, student).

    The defaults are the best values of arXiv 2510.07227.
    """

    loss: str = "forward_kl"
    """Distance between the teacher's and the student's predictions, by its name in ``litgpt_whittle.losses``"""
    alpha: float = 0.2
    """Weight of the cross-entropy with the true next tokens. Without effect where beta is 0: a lone cross-entropy is
    not scaled, so that such a run is what ``litgpt pretrain`` does"""
    beta: float = 0.8
    """Weight of the distance to the teacher. With 0 no teacher is needed or loaded"""
    temperature: float = 0.9
    """Divides the logits of both before the distance is taken"""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"distill.{name} must be 0 or more, got {getattr(self, name)}; raise it")
        if self.alpha == self.beta == 0:
            raise UserError("distill.alpha and distill.beta must not both be 0, nothing would be learned; raise one")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"distill.temperature must be above 0, got {self.temperature}; the paper's best is 0.9")

    @property
    def objective(self) -> Objective:
        """The loss to compute; raises `UserError` where its name is not known."""
        if self.beta == 0:
            return Objective()
        return Objective(self.alpha, self.beta, self.temperature, lookup("litgpt_whittle.losses", self.loss))
