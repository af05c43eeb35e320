"""Base class of a surrogate's regressors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from litgpt.config import Config

from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.surrogates.features import Choice


class Regressor(ABC):
    """Regressor of numeric targets from sub-networks.

    The encoding of a sub-network is up to the subclass, but must consist of plain numbers or text that mean the same
    for any teacher. Predictions must be deterministic: they depend only on the settings, the seed and the training
    examples.

    Args:
        args: The settings.

    Raises:
        UserError: If the settings are incomplete.
    """

    n_folds: int = 5
    """Number of folds of the cross-validation that measures held-out accuracy"""

    def __init__(self, args: SurrogateArgs) -> None:
        self.args = args

    @abstractmethod
    def read(self, teacher: Config, choices: Sequence[Choice], ranking: Ranking | None = None) -> list[Any]:
        """Encode each sub-network.

        Args:
            teacher: Config of the teacher.
            choices: The teacher's sub-networks.
            ranking: The teacher's ranking, if there is one.
        """

    @abstractmethod
    def fit(self, known: Sequence[Any], targets: np.ndarray, seed: int) -> None:
        """Fit the regressor from scratch and discard any earlier fit.

        Args:
            known: Encodings from `read`, possibly of several teachers.
            targets: Targets of about zero mean and unit variance, shape (n,).
            seed: Seed of all randomness.
        """

    @abstractmethod
    def predict(self, unknown: Sequence[Any]) -> np.ndarray:
        """Predict the targets of encodings from `read`, shape (n,)."""

    def deviation(self, unknown: Sequence[Any]) -> np.ndarray:
        """Return the standard deviation of each prediction, shape (n,); by default zeros."""
        return np.zeros(len(unknown))

    def save(self, folder: Path) -> bool:
        """Save the fitted regressor in files without code, if fitting it again from a journal would take long.

        Returns:
            True if anything was saved.
        """
        return False
