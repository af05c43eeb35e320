"""Predict the scores of sub-networks from evaluations of the same search or of another search.

`litgpt_whittle.strategies.surrogate_search` uses the predictions. Scores are fitted as logarithms, standardised within
each bin of a search, so that a surrogate can learn from other teachers, data and measures. Fitted regressors are never
loaded from a file; they are fitted again from a journal, so that untrusted files cannot run code.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.evaluations import (
    bins_of,
    scored,
)
from litgpt_whittle.journal import (
    JOURNAL,
    read_journal,
)
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.subnet import fingerprint
from litgpt_whittle.surrogates.base import Regressor
from litgpt_whittle.surrogates.features import Choice

LEAST = 10
"""Minimum number of scores to fit a surrogate"""


@dataclass(frozen=True, eq=False)
class Examples:
    """The evaluations of another search."""

    teacher: Config
    bins: tuple[tuple[list[Mapping[str, Any]], np.ndarray], ...]
    """Sub-networks and scores of each bin"""
    fingerprint: str
    """Sixteen hex digits that identify the evaluations"""

    @classmethod
    def read(cls, path: Path) -> Examples:
        """Read a journal, or the journal in a search's folder.

        Raises:
            UserError: If there is no journal, another version wrote it, or too few of its candidates have a score.
        """
        path = Path(path)
        file = path / JOURNAL if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"surrogate.path must be the folder or journal of a search, got {str(path)!r}; correct it")
        header, evaluations = read_journal(file)
        try:
            teacher, score = Config(**header["teacher"]["architecture"]), header["settings"]["score"]
        except (KeyError, TypeError):
            raise UserError(f"{str(file)!r} was written by another version; search again to learn from it") from None
        found = scored(evaluations, score)
        if len(found) < LEAST:
            raise UserError(
                f"a surrogate needs at least {LEAST} candidates with a score, {str(file)!r} has {len(found)}; "
                "use a longer search"
            )
        bins: list[tuple[list[Mapping[str, Any]], np.ndarray]] = []
        for bin in bins_of(found):
            own = [e for e in found if e.bin == bin]
            bins.append(([e.subnet for e in own], np.array([e.score(score) for e in own])))
        text = json.dumps([[e.bin, e.subnet, e.score(score)] for e in found])
        return cls(teacher, tuple(bins), hashlib.sha256(text.encode()).hexdigest()[:16])

    def __len__(self) -> int:
        return sum(len(scores) for _, scores in self.bins)

    @property
    def choices(self) -> list[Mapping[str, Any]]:
        """Sub-networks of all bins."""
        return [choice for choices, _ in self.bins for choice in choices]

    @property
    def targets(self) -> np.ndarray:
        """Scores of all bins, standardised within each bin, shape (n,)."""
        return np.concatenate([Scale.of(scores).standardised(scores) for _, scores in self.bins])


class Scale(NamedTuple):
    """Standardisation of scores."""

    is_log: bool
    mean: float
    deviation: float

    @classmethod
    def of(cls, scores: np.ndarray) -> Scale:
        """Fit the mean and standard deviation of the scores, or of their logarithms if all are positive."""
        is_log = bool((scores > 0).all())
        values = np.log(scores) if is_log else scores
        mean, deviation = float(values.mean()), float(values.std())
        # the deviation of equal scores may be a rounding error instead of 0
        return cls(is_log, mean, deviation if deviation > 1e-9 * abs(mean) else 1.0)

    def standardised(self, scores: np.ndarray) -> np.ndarray:
        return ((np.log(scores) if self.is_log else scores) - self.mean) / self.deviation

    def restored(self, targets: np.ndarray) -> np.ndarray:
        values = targets * self.deviation + self.mean
        return np.exp(values.clip(max=700)) if self.is_log else values


class Surrogate:
    """Predictor of scores (lower is better) in their original unit.

    With examples of another search, a regressor fitted to these is the prior. Linear regression maps its predictions to
    the scale of this search. A second regressor is fitted to the residuals, and so corrects an unsuitable prior.

    Args:
        make: Returns an unfitted regressor.
        teacher: Config of the teacher whose sub-networks to predict.
        ranking: The teacher's ranking, if there is one.
        examples: Evaluations of another search to pretrain on.
        seed: Seed of all randomness.
    """

    def __init__(
        self,
        make: Callable[[], Regressor],
        teacher: Config,
        ranking: Ranking | None = None,
        examples: Examples | None = None,
        seed: int = 0,
    ) -> None:
        self.make, self.teacher, self.ranking, self.examples, self.seed = make, teacher, ranking, examples, seed
        self.prior: Regressor | None = None
        if examples is not None:
            self.prior = make()
            self.prior.fit(self._read_examples(examples, self.prior), examples.targets, seed)
        self._reset()

    def _reset(self) -> None:
        self.regressor = self.make()
        self._is_own = False
        self._slope, self._offset = 1.0, 0.0
        # the scale of the bin with the most scores
        scores = [] if self.examples is None else [scores for _, scores in self.examples.bins]
        self._scale = Scale.of(max(scores, key=len)) if scores else None

    def unfitted(self) -> Surrogate:
        """Return a copy with the same prior, but not fitted to this search's scores."""
        another = copy.copy(self)
        another._reset()
        return another

    @property
    def is_fitted(self) -> bool:
        """True if the surrogate can predict."""
        return self._is_own or self.prior is not None

    def fit(self, choices: Sequence[Choice], scores: Sequence[float]) -> None:
        """Fit the surrogate from scratch to this search's finite scores; do nothing if there are fewer than `LEAST`."""
        finite = [i for i, score in enumerate(scores) if math.isfinite(score)]
        if len(finite) < LEAST:
            return
        values = np.array([scores[i] for i in finite])
        read = self.regressor.read(self.teacher, [choices[i] for i in finite], self.ranking)
        self._scale = Scale.of(values)
        targets = self._scale.standardised(values)
        if self.prior is not None:
            before = self.prior.predict(read)
            variance = float(before.var())
            covariance = float(((before - before.mean()) * targets).mean())
            # ignore a prior that is negatively correlated with the scores
            self._slope = max(covariance / variance, 0.0) if variance > 0 else 0.0
            self._offset = float(-self._slope * before.mean())
            targets = targets - self._slope * before - self._offset
        self.regressor.fit(read, targets, self.seed)
        self._is_own = True

    def predict(self, choices: Sequence[Choice], optimism: float = 0.0) -> np.ndarray:
        """Predict scores, shape (n,).

        Args:
            choices: Sub-networks.
            optimism: κ in the lower confidence bound μ − κσ; no effect for regressors without a standard deviation.
        """
        assert self._scale is not None, "the surrogate must be fitted before it predicts"
        read = self.regressor.read(self.teacher, choices, self.ranking)
        expected = np.zeros(len(read))
        if self.prior is not None:
            expected += self._slope * self.prior.predict(read) + self._offset
        if self._is_own:
            expected += self.regressor.predict(read)
        if optimism:
            expected -= optimism * (self.regressor if self._is_own else self.prior or self.regressor).deviation(read)
        return self._scale.restored(expected)

    def save(self, folder: Path) -> bool:
        """Save the fitted regressor if it supports saving; return whether it did."""
        return (self.regressor if self._is_own else self.prior or self.regressor).save(folder)

    def examples_tau(self) -> float:
        """Return Kendall's τ between the scores of the examples and their cross-validated predictions."""
        assert self.examples is not None and self.prior is not None, "only a surrogate with examples has this τ"
        read = self._read_examples(self.examples, self.prior)
        return held_out_tau(self.make, read, self.examples.targets, self.seed)

    def _read_examples(self, examples: Examples, prior: Regressor) -> list[Any]:
        is_same = fingerprint(examples.teacher) == fingerprint(self.teacher)
        return prior.read(examples.teacher, examples.choices, self.ranking if is_same else None)


def held_out_tau(make: Callable[[], Regressor], read: Sequence[Any], targets: np.ndarray, seed: int = 0) -> float:
    """Return Kendall's τ between targets and their cross-validated predictions.

    Args:
        make: Returns an unfitted regressor.
        read: Encodings of the sub-networks.
        targets: Standardised scores, shape (n,).
        seed: Seed of all randomness.
    """
    from scipy.stats import kendalltau
    from sklearn.model_selection import KFold

    regressor = make()
    predicted = np.zeros(len(targets))
    for known, held_out in KFold(regressor.n_folds, shuffle=True, random_state=seed).split(targets):
        regressor.fit([read[i] for i in known], targets[known], seed)
        predicted[held_out] = regressor.predict([read[i] for i in held_out])
    return float(kendalltau(predicted, targets).statistic)
