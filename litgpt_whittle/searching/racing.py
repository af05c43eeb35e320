"""Racing: candidates see more and more text side by side, and those that are surely not among the best see no more.

Candidates of one search differ by much more than they vary from window to window in the same way, so that differences
between two of them on the same windows tell them apart long before their scores do (a paired t-test). Racing of models
by such tests is Maron & Moore's (1997); F-Race (Birattari et al., 2002) is the same idea for settings of algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from litgpt_whittle.searching.args import RacingArgs

Losses = np.ndarray
"""A candidate's mean loss on each window that it saw, shape (n_windows_seen,)"""


def stages(args: RacingArgs, n_batches: int) -> list[int]:
    """How many batches a candidate has seen at the end of each stage, the last of which is all of them."""
    ends, end = [], args.start
    while end < n_batches:
        ends.append(end)
        end = max(round(end * args.growth), end + 1)
    return [*ends, n_batches]


def losers(racing: Mapping[int, Losses], finished: Sequence[Losses], n_kept: int, alpha: float) -> list[int]:
    """The candidates that are surely not among the best.

    Args:
        racing: Losses of those that race, by their number, all on the same windows.
        finished: Losses of candidates that have seen everything, the same windows first.
        n_kept: How many of all these are looked for.
        alpha: How likely it may be that a candidate is dropped that is no worse than the last of them.

    Returns:
        Their numbers, in ascending order.
    """
    n_windows = len(next(iter(racing.values())))
    pool = [*racing.values(), *(losses[:n_windows] for losses in finished)]
    if len(pool) <= n_kept or n_windows < 2:
        return []
    # the last one that would be kept by what is known now
    rival = sorted(pool, key=lambda losses: losses.mean())[n_kept - 1]
    return [i for i, losses in racing.items() if _is_worse(losses - rival, alpha)]


def _is_worse(differences: Losses, alpha: float) -> bool:
    """One-sided paired t-test; differences without any spread need none."""
    if differences.std() <= 1e-12 * max(abs(differences.mean()), 1.0):
        return bool(differences.mean() > 1e-9)
    return bool(stats.ttest_1samp(differences, 0.0, alternative="greater").pvalue < alpha)


def estimate(losses: Losses, n_tokens: np.ndarray, yardstick: Losses) -> float:
    """What a dropped candidate would lose on everything: what it lost more than another one, added to that one's loss.

    Args:
        losses: The candidate's.
        n_tokens: Tokens of all windows.
        yardstick: Losses of one that has seen everything.
    """
    seen = n_tokens[: len(losses)]
    behind = np.average(losses - yardstick[: len(losses)], weights=seen)
    return float(np.average(yardstick, weights=n_tokens) + behind)
