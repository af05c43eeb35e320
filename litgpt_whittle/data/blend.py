"""Mix the windows of several texts, in given shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np

from litgpt_whittle.data.token_file import Shuffled
from litgpt_whittle.errors import UserError

Paths = dict[str, float] | str
"""A path, or the paths of a weighted mix of texts with their weights"""


def weighted(paths: Paths, option: str) -> dict[str, Fraction]:
    """Return the share of tokens of each path; the shares add up to 1.

    Args:
        paths: A path, or paths with weights, which need not add up to 1.
        option: Name of the option, for error messages.

    Raises:
        UserError: If there is no path, or a weight is not a positive number.
    """
    if not isinstance(paths, Mapping):
        return {str(paths): Fraction(1)}
    if not paths:
        raise UserError(f"{option} must name text, got an empty mix; try '{{wiki.jsonl: 0.7, code/: 0.3}}'")
    for path, weight in paths.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise UserError(f"each weight in {option} must be a positive number, got {weight!r} for {path!r}")
    exact = {str(path): Fraction(weight) for path, weight in paths.items()}
    total = sum(exact.values())
    return {path: weight / total for path, weight in exact.items()}


def token_shares(document_shares: Sequence[Fraction], lengths: Sequence[Fraction]) -> list[Fraction]:
    """Return the shares of tokens that give these shares of documents, by the mean tokens per document of each text."""
    sizes = [share * length for share, length in zip(document_shares, lengths)]
    return [size / sum(sizes) for size in sizes]


def epoch_counts(sizes: Sequence[int], shares: Sequence[Fraction]) -> list[int]:
    """Return the number of windows of each text in an epoch: the fewest that keep the shares and cover every text."""
    total = max(size / share for size, share in zip(sizes, shares))
    return [max(round(total * share), size) for size, share in zip(sizes, shares)]


def interleaved(counts: Sequence[int], draw: np.random.Generator | None = None) -> np.ndarray:
    """Return an order of texts, as indices, in which every prefix has nearly the shares of the whole.

    A text with m windows divides the order into m equal intervals, and puts one window into each: in the middle, or at
    random with `draw`. Among the first n windows, the number of a text's windows differs from its share of n by less
    than the number of texts.
    """
    places = [(np.arange(count) + (0.5 if draw is None else draw.random(count))) / count for count in counts]
    texts = np.repeat(np.arange(len(counts)), counts)
    return texts[np.argsort(np.concatenate(places), kind="stable")]


def blended_once(sizes: Sequence[int], shares: Sequence[Fraction]) -> list[int]:
    """Return window indices, counted over all texts, so that texts have the given shares; no window is repeated."""
    total = min(size / share for size, share in zip(sizes, shares))
    counts = [max(int(total * share), 1) for share in shares]
    return _in_order(interleaved(counts), sizes, [np.arange(count) for count in counts])


class Blended(Shuffled):
    """Sampler that interleaves shuffled texts in given shares, in an order that depends only on seed and epoch.

    An epoch covers every text at least once; texts that are short for their share are repeated. Indices are counted
    over the windows of all texts.

    Args:
        sizes: Number of windows of each text.
        shares: Share of each text in the windows of an epoch.
        seed: The seed.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[Fraction], seed: int) -> None:
        self.sizes, self.counts = list(sizes), epoch_counts(sizes, shares)
        super().__init__(sum(self.counts), seed)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng((self.seed, self.epoch))
        windows = []
        for size, count in zip(self.sizes, self.counts):
            passes = [draw.permutation(size) for _ in range(-(-count // size))]
            windows.append(np.concatenate(passes)[:count])
        order = _in_order(interleaved(self.counts, draw), self.sizes, windows)
        self.epoch += 1
        return iter(order)


def _in_order(texts: np.ndarray, sizes: Sequence[int], windows: Sequence[np.ndarray]) -> list[int]:
    """Return the windows of each text in its turn, as indices into all texts together."""
    order, first = np.empty(len(texts), dtype=np.int64), 0
    for i, (size, chosen) in enumerate(zip(sizes, windows)):
        order[texts == i] = first + chosen
        first += size
    return order.tolist()
