"""Forest of extremely randomised trees on the features of sub-networks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import ConfigKey
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.surrogates.base import Regressor
from litgpt_whittle.surrogates.features import Choice, Features

N_TREES = 100


class Trees(Regressor):
    """scikit-learn's `ExtraTreesRegressor` on `litgpt_whittle.surrogates.features`.

    Kept shares of importance scores are features only if all training examples have them (their teachers are ranked).

    Args:
        args: The settings.

    Raises:
        UserError: If `args.model` is set, which only kind text uses.
    """

    def __init__(self, args: SurrogateArgs) -> None:
        super().__init__(args)
        if args.model is not None:
            raise UserError(f"surrogate.model is an option of kind text, not trees, got {args.model!r}; leave it out")
        self._features: dict[tuple[ConfigKey, str | None], Features] = {}

    def read(
        self, teacher: Config, choices: Sequence[Choice], ranking: Ranking | None = None
    ) -> list[dict[str, float]]:
        """Return the features of each sub-network."""
        key = ConfigKey(teacher), None if ranking is None else ranking.fingerprint
        if key not in self._features:
            self._features[key] = Features(teacher, ranking)
        features = self._features[key](choices)
        return [dict(zip(features, row)) for row in zip(*(values.tolist() for values in features.values()))]

    def fit(self, known: Sequence[dict[str, float]], targets: np.ndarray, seed: int) -> None:
        """Fit the forest."""
        from sklearn.ensemble import ExtraTreesRegressor

        self.names = [name for name in known[0] if all(name in features for features in known)]
        # one job: the trees are small, and the other processes of a search need the CPU for their devices
        self._forest = ExtraTreesRegressor(N_TREES, random_state=seed, n_jobs=1)
        self._forest.fit(self._matrix(known), targets)

    def predict(self, unknown: Sequence[dict[str, float]]) -> np.ndarray:
        """Return the mean over the trees, shape (n,)."""
        return self._by_tree(unknown).mean(0)

    def deviation(self, unknown: Sequence[dict[str, float]]) -> np.ndarray:
        """Return the standard deviation over the trees, shape (n,)."""
        return self._by_tree(unknown).std(0)

    def _by_tree(self, unknown: Sequence[dict[str, float]]) -> np.ndarray:
        """Return the predictions of every tree, shape (n_trees, n)."""
        matrix = self._matrix(unknown).astype(np.float32)
        # same result as the forest's own method, whose checks and threads take a hundred times as long for a few rows
        predicted = [tree.tree_.predict(matrix) for tree in self._forest.estimators_]
        return np.array(predicted).reshape(len(predicted), len(matrix))

    def _matrix(self, read: Sequence[dict[str, float]]) -> np.ndarray:
        return np.array([[features[name] for name in self.names] for features in read])
