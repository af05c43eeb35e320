"""Repair settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.repair.costs import widest_map

LEAST_TOKENS, TOKENS_PER_INPUT = 65_536, 32
"""Default number of calibration tokens: minimum, and number per input of the widest linear map; fewer would overfit"""

LEAST_TOKENS_TO_REFINE, TOKENS_PER_INPUT_TO_REFINE = 16_384, 12
"""Default number of tokens for the closed form if `refine_passes` follow it: minimum, and number per input"""

REFINE_LR = 3e-4
"""Default peak learning rate of `refine_passes`"""


@dataclass
class RepairArgs:
    """Closed-form repair of the student before it is saved"""

    basis: Literal["pca", "coordinates"] = "pca"
    """Student channels: leading principal directions of the teacher's residual stream, or a subset of its channels"""
    choose_units: bool = True
    """Keep the sub-network's numbers of heads and neurons, but select those with the largest Optimal-Brain-Surgeon
    saliency"""
    tokens: int | None = None
    """Number of calibration tokens; by default 32 per input of the student's widest linear map, and at least 65,536"""
    refine_passes: float = 0.0
    """Passes over the calibration tokens that train all blocks jointly on the teacher's predictions, after the closed
    form"""
    closed_form_tokens: int | None = None
    """Number of calibration tokens for the closed form, if refine_passes is above 0. By default 12 per input of the
    student's widest linear map, and at least 16,384. Joint training gains most from tokens that are not among them"""
    refine_lr: float = REFINE_LR
    """Peak learning rate of refine_passes, annealed to zero"""
    head_passes: int = 1
    """Passes over the final hidden states that fit the LM head to the teacher's predictions; 0 keeps the closed form"""

    def __post_init__(self) -> None:
        if self.basis not in ("pca", "coordinates"):
            raise UserError(f"repair.basis must be pca or coordinates, got {self.basis!r}; choose one")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"repair.tokens must be at least 1, got {self.tokens}; 65536 suits small models")
        if self.closed_form_tokens is not None and not (self.closed_form_tokens > 0 and self.refine_passes):
            raise UserError(
                f"repair.closed_form_tokens must be at least 1 and needs repair.refine_passes above 0, got "
                f"{self.closed_form_tokens} and {self.refine_passes}; leave it out, or give repair.tokens"
            )
        if not 0 <= self.refine_passes < math.inf:
            raise UserError(f"repair.refine_passes must be 0 or more, got {self.refine_passes}; 0 is the default")
        if not self.refine_lr > 0:
            raise UserError(f"repair.refine_lr must be above 0, got {self.refine_lr}; 3e-4 suits most models")
        if self.refine_lr != REFINE_LR and not self.refine_passes:
            raise UserError(
                f"repair.refine_lr has no effect without repair.refine_passes, got {self.refine_lr}; set both or none"
            )
        if self.head_passes < 0:
            raise UserError(f"repair.head_passes must be 0 or more, got {self.head_passes}; 1 is the default")

    def n_closed_form(self, config: Config) -> int:
        """Return the number of tokens that the closed form of a student with this config is fitted to."""
        if not self.refine_passes:
            return self.n_tokens(config)
        wanted = self.closed_form_tokens or max(LEAST_TOKENS_TO_REFINE, TOKENS_PER_INPUT_TO_REFINE * widest_map(config))
        return min(wanted, self.n_tokens(config))

    def n_tokens(self, config: Config) -> int:
        """Return the number of calibration tokens for a student with this config."""
        return self.tokens or max(LEAST_TOKENS, TOKENS_PER_INPUT * widest_map(config))
