"""Measure the overlap of text between two sets of samples, ignoring templates that many samples share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from litgpt_whittle.tensors import IGNORE_INDEX

RUN = 32
"""Tokens per compared run; shorter runs may match by chance"""

REPEATED = 3
"""Number of occurrences in one set from which a run counts as a template, such as a system prompt, and is ignored"""


class Sample(NamedTuple):
    """One sample, up to its last token that counts in the loss."""

    input_ids: torch.Tensor
    """Shape (T,)"""
    targets: torch.Tensor
    """Next tokens, -100 at positions that do not count in the loss, shape (T,)"""


def samples_of(input_ids: torch.Tensor, targets: torch.Tensor) -> list[Sample]:
    """Return a batch's rows as samples, each up to its last token that counts; skip rows without such a token.

    Args:
        input_ids: Shape (B, T).
        targets: Shape (B, T).
    """
    counts = (targets != IGNORE_INDEX).flip(1)
    ends = input_ids.shape[1] - counts.int().argmax(1)
    rows = zip(input_ids, targets, ends.tolist(), counts.any(1).tolist())
    return [Sample(ids[:end], labels[:end]) for ids, labels, end, any_counts in rows if any_counts]


def common_share(ours: Sequence[Sample], theirs: Sequence[Sample], max_seq_length: int) -> float:
    """Return the larger of two shares, each the fraction of one set's text that also occurs in the other set.

    Both shares are needed because one set may be a small part of the other. Whole samples are compared, and also runs
    of counting tokens at any position, since text may be split into windows at different places. Runs that one set
    repeats are templates, and are ignored.

    Args:
        ours: Samples.
        theirs: Samples to compare with.
        max_seq_length: Length at which samples are truncated; truncated samples are compared only by runs.
    """
    if not ours or not theirs:
        return 0.0
    length = max(len(sample.input_ids) for sample in ours)
    # long enough to exclude chance, and short enough that even short windows contain many runs, wherever they begin
    size = min(RUN, max(length // 4, min(length // 2, 16), 8), length)
    whole = _share(_whole(ours, max_seq_length), _whole(theirs, max_seq_length))
    n_repeated = [max(2, min(REPEATED, len(side))) for side in (ours, theirs)]
    is_plain = _is_plain(ours) and _is_plain(theirs)
    return max(whole, _share(_runs(ours, size), _runs(theirs, size), n_repeated, but_not_all=is_plain))


def _share(
    ours: np.ndarray, theirs: np.ndarray, n_repeated: Sequence[int] | None = None, but_not_all: bool = False
) -> float:
    """Return the larger of two shares, each the fraction of one set's hashes that also occur in the other set.

    Args:
        ours: Hashes, shape (n,).
        theirs: Hashes to compare with, shape (m,).
        n_repeated: For each set, the number of occurrences from which a hash is ignored; by default no hash is.
        but_not_all: If true, ignore no hash if 1% or less of a set would remain, as in a text that repeats itself
            throughout.
    """
    (a, n_a), (b, n_b) = (np.unique(side, return_counts=True) for side in (ours, theirs))
    _, in_a, in_b = np.intersect1d(a, b, assume_unique=True, return_indices=True)
    if n_repeated is not None:
        once_a, once_b = n_a < n_repeated[0], n_b < n_repeated[1]
        once_a[in_a] = once_b[in_b] = once_a[in_a] & once_b[in_b]
        is_left = all(n[once].sum() > n.sum() / 100 for n, once in ((n_a, once_a), (n_b, once_b)))
        if is_left or not but_not_all:
            n_a, n_b = n_a * once_a, n_b * once_b
    return max(float(n[common].sum() / max(n.sum(), 1)) for n, common in ((n_a, in_a), (n_b, in_b)))


def _is_plain(samples: Iterable[Sample]) -> bool:
    """Return whether all tokens count, unlike in instruction data."""
    return all((sample.targets != IGNORE_INDEX).all() for sample in samples)


def _whole(samples: Iterable[Sample], max_seq_length: int) -> np.ndarray:
    """Return a hash of every sample that was not truncated."""
    rows = (torch.cat([ids, labels[-1:]]).numpy() for ids, labels in samples if len(ids) < max_seq_length)
    return np.array([hash(row.tobytes()) for row in rows], np.int64)


def _runs(samples: Iterable[Sample], size: int) -> np.ndarray:
    """Return a hash of every run of `size` counting tokens."""
    gap = torch.tensor([IGNORE_INDEX])  # no run crosses from one sample to the next
    ids = torch.cat([part for sample in samples for part in (sample.targets, gap)]).numpy()
    n = max(len(ids) - size + 1, 0)
    numbers, runs = ids.astype(np.uint64) + np.uint64(1), np.zeros(n, np.uint64)
    for i in range(size):
        runs *= np.uint64(6364136223846793005)  # modulo 2**64
        runs += numbers[i : i + n]
    n_before = np.concatenate([[0], np.cumsum(ids != IGNORE_INDEX)])
    return runs[n_before[size:] - n_before[:n] == size]
