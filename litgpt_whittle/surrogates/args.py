"""Argument group of surrogates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litgpt_whittle.errors import UserError
from litgpt_whittle.setting_checks import changed, check_positive


@dataclass
class SurrogateArgs:
    """Predictor of candidates' scores, which reduces the number of evaluations"""

    mode: Literal["none", "filter", "objective"] = "none"
    """With filter, the strategy proposes several candidates per evaluation, and the one with the best prediction is
    evaluated. With objective, the strategy searches on predictions; the best candidates are evaluated, the surrogate is
    fitted to them, and the search repeats"""
    kind: str = "trees"
    """Regressor, by its name in `litgpt_whittle.surrogates`: trees (a forest on features of sub-networks), or text (a
    language model that reads a description of them)"""
    path: Path | None = None
    """Folder or journal of another search to pretrain on; its teacher and data may differ"""
    importance: Path | None = None
    """The teacher's `importance.pt`, written by `litgpt rank`: adds the kept shares of importance scores as features"""
    n_initial: int = 20
    """Evaluations before the first predictions, if no `path` is given"""
    refit: float = 0.1
    """With filter, the surrogate is fitted again once the number of evaluations has grown by this fraction, and by at
    least ten"""
    n_proposals: int = 30
    """Candidates proposed per evaluation, with filter"""
    optimism: float = 1.0
    """κ in the lower confidence bound μ − κσ that ranks candidates. Among equal predictions, the bound prefers the most
    uncertain one, so that the search explores. No effect for regressors without a standard deviation"""
    n_inner: int = 500
    """Candidates to predict in each search on predictions, with objective"""
    n_evaluated: int = 10
    """Candidates to evaluate after each search on predictions, with objective"""
    model: str | None = None
    """Folder or name of a Hugging Face model for sequence classification, for kind text; for example the folder
    `surrogate` that an earlier search with kind text has written"""
    epochs: int = 10
    """Training epochs per fit, for kind text"""
    learning_rate: float = 5e-5
    """Peak learning rate, reached after a tenth of the steps, for kind text"""

    def __post_init__(self) -> None:
        if self.mode not in ("none", "filter", "objective"):
            raise UserError(f"surrogate.mode must be none, filter or objective, got {self.mode!r}")
        numbers = {
            name: getattr(self, name) for name in ("n_initial", "n_proposals", "n_inner", "n_evaluated", "epochs")
        }
        check_positive("surrogate", **numbers)
        for name in ("refit", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"surrogate.{name} must be more than 0, got {getattr(self, name)}")
        if not 0 <= self.optimism < math.inf:
            raise UserError(f"surrogate.optimism must be 0 or more, got {self.optimism}")
        if self.mode == "none" and (unused := changed(self)):
            raise UserError(f"surrogate.{unused[0]} needs a surrogate; add --surrogate.mode filter or leave it out")
