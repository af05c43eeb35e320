"""What every regressor behind a surrogate is: it reads sub-networks, is fitted on some, and predicts others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from litgpt.config import Config

from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.searching.args import SurrogateArgs
from litgpt_whittle.surrogates.features import Choice


class Regressor(ABC):
    """Learns numbers that go with sub-networks.

    What is read of a sub-network is up to it, but must be plain numbers or text that mean the same in any teacher. It
    must be deterministic: its predictions follow from the settings, the seed and what it was fitted on.

    Args:
        args: The settings.

    Raises:
        UserError: If they are not enough to go by.
    """

    n_folds: int = 5
    """How many times it is fitted to find out how well it predicts what it has not seen"""

    def __init__(self, args: SurrogateArgs) -> None:
        self.args = args

    @abstractmethod
    def read(self, teacher: Config, choices: Sequence[Choice], ranking: Ranking | None = None) -> list[Any]:
        """What it needs to know of each sub-network.

        Args:
            teacher: Whose sub-networks they are.
            choices: The sub-networks.
            ranking: The teacher's ranking, if there is one.
        """

    @abstractmethod
    def fit(self, known: Sequence[Any], targets: np.ndarray, seed: int) -> None:
        """Learns anew, forgetting what it was fitted on before.

        Args:
            known: What `read` gave, of any teachers.
            targets: What to predict, of about zero mean and unit variance, shape (n,).
            seed: Where all randomness comes from.
        """

    @abstractmethod
    def predict(self, unknown: Sequence[Any]) -> np.ndarray:
        """Predicts for what `read` gave, shape (n,)."""

    def deviation(self, unknown: Sequence[Any]) -> np.ndarray:
        """How far off each prediction may be, as a standard deviation, shape (n,); 0 where nothing is known of that."""
        return np.zeros(len(unknown))

    def save(self, folder: Path) -> bool:
        """Writes what it has learnt, in files that hold no code, where a journal does not bring it back soon enough.

        Returns:
            Whether anything was written.
        """
        return False
