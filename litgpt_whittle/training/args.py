"""Argument groups of the training commands, validated at construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import litgpt.args

from litgpt_whittle.errors import UserError


@dataclass
class TrainArgs(litgpt.args.TrainArgs):
    """Training-related arguments: those of litgpt, and a few more"""

    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning-rate schedule after the warm-up: a half cosine, or wsd (warm-up, stable, decay): constant, then linear
    decay"""
    lr_decay_fraction: float = 0.1
    """Fraction of training over which the learning rate decays, with wsd"""
    tie_embeddings: bool | None = None
    """If true, the LM head shares the embedding matrix; if false, it has its own. By default as in the checkpoint that
    training starts from; random weights are untied by default, as in ``litgpt pretrain``"""
    skip_nan: bool = False
    """If true, skip the update of a step whose loss or gradient is not finite, and continue"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lr_decay_fraction <= 1:
            raise UserError(
                f"train.lr_decay_fraction must be above 0 and at most 1, got {self.lr_decay_fraction}; 0.1 is usual"
            )
