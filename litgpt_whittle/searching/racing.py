"""Racing: evaluate candidates on more and more data, and drop those that are significantly worse than the best.

Losses of all candidates vary from window to window, mostly in the same way, so a paired t-test on the same windows
separates two candidates long before their mean scores do. Racing of models by such tests goes back to Maron & Moore
(1997); F-Race (Birattari et al., 2002) applies the same idea to the configuration of algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from litgpt_whittle.searching.args import RacingArgs

Losses = np.ndarray
"""A candidate's mean loss on each window evaluated so far, shape (n_windows_seen,)"""


def stages(args: RacingArgs, n_batches: int) -> list[int]:
    """Return the cumulative number of batches at the end of each stage; the last stage covers all batches."""
    ends, end = [], args.start
    while end < n_batches:
        ends.append(end)
        end = max(round(end * args.growth), end + 1)
    return [*ends, n_batches]


def losers(racing: Mapping[int, Losses], finished: Sequence[Losses], n_kept: int, alpha: float) -> list[int]:
    """Return the candidates that are significantly worse than the best `n_kept`.

    Args:
        racing: Losses of the candidates in the race, all on the same windows; keys are candidate numbers.
        finished: Losses of candidates evaluated on all windows. The first windows are those of `racing`.
        n_kept: Number of best candidates to find.
        alpha: Significance level of the test against the worst of the best `n_kept`.

    Returns:
        Numbers of the candidates to drop, in the order of `racing`.
    """
    n_windows = len(next(iter(racing.values())))
    pool = [*racing.values(), *(losses[:n_windows] for losses in finished)]
    if len(pool) <= n_kept or n_windows < 2:
        return []
    # the worst candidate that would be kept by the losses so far
    rival = sorted(pool, key=lambda losses: losses.mean())[n_kept - 1]
    return [i for i, losses in racing.items() if _is_worse(losses - rival, alpha)]


def _is_worse(differences: Losses, alpha: float) -> bool:
    """Return whether the mean difference is significantly above 0 (one-sided paired t-test).

    Without variance there is no test, so differences that are all equal are compared with 0.
    """
    if differences.std() <= 1e-12 * max(abs(differences.mean()), 1.0):
        return bool(differences.mean() > 1e-9)
    return bool(stats.ttest_1samp(differences, 0.0, alternative="greater").pvalue < alpha)


def estimate(losses: Losses, n_tokens: np.ndarray, reference: Losses) -> float:
    """Estimate a dropped candidate's loss on all windows: the loss of a reference plus the mean difference so far.

    Args:
        losses: The dropped candidate's mean loss on each window so far, shape (n_windows_seen,).
        n_tokens: Tokens of each window, shape (n_windows,).
        reference: Mean losses of a candidate evaluated on all windows, shape (n_windows,).
    """
    seen = n_tokens[: len(losses)]
    margin = np.average(losses - reference[: len(losses)], weights=seen)
    return float(np.average(reference, weights=n_tokens) + margin)
