"""What a search's evaluations say: the best of each bin, the front, and the sizes of candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from litgpt_whittle.journal import Evaluation
from litgpt_whittle.keep import n_units

Bests = dict[str, Evaluation]


def best_of(evaluations: Sequence[Evaluation], score: str = "perplexity") -> Bests:
    """The best evaluation in every bin that has one, the earlier one of equals."""
    bests: Bests = {}
    for evaluation in scored(evaluations, score):
        best = bests.get(evaluation.bin)
        if best is None or evaluation.score(score) < best.score(score):
            bests[evaluation.bin] = evaluation
    return {bin: bests[bin] for bin in bins_of(evaluations) if bin in bests}


def scored(evaluations: Sequence[Evaluation], score: str = "perplexity") -> list[Evaluation]:
    """The evaluations that have a score."""
    return [evaluation for evaluation in evaluations if math.isfinite(evaluation.score(score))]


def bins_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """The bins that candidates were built into, in their order."""
    return list(dict.fromkeys(evaluation.bin for evaluation in evaluations))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats in both coordinates (lower is better), along the first one."""
    front: list[int] = []
    lowest = math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < lowest:
            front.append(i)
            lowest = points[i][1]
    return front


def prediction_tau(evaluations: Sequence[Evaluation], score: str = "perplexity") -> tuple[float, int]:
    """Kendall's τ between what a surrogate predicted of candidates and what was then measured, and of how many.

    NaN where there are fewer than two, or all predictions or scores are the same.
    """
    from scipy.stats import kendalltau

    both = scored(scored(evaluations, score), "predicted")
    predicted, measured = [e.score("predicted") for e in both], [e.score(score) for e in both]
    if len(set(predicted)) < 2 or len(set(measured)) < 2:
        return math.nan, len(both)
    return float(kendalltau(predicted, measured).statistic), len(both)


def mean_sizes(choice: Mapping[str, Any]) -> dict[str, float]:
    """The sizes of a sub-network as `SubNet.to_dict` gives it, by litgpt's names; means over the layers that have them.

    Nothing is made of the choice, which would take long for the many candidates of a fine space.
    """
    groups, per_group = _per_layer(choice["n_query_groups"]), _per_layer(choice.get("heads_per_group", 1))
    n_layers = max(len(groups), len(per_group))
    heads = [a * b for a, b in zip(_repeated(groups, n_layers), _repeated(per_group, n_layers))]
    sizes = {name: float(n_units(choice[name])) for name in ("n_embd", "n_layer", "head_size")}
    sizes["n_head"] = mean(heads)
    for name in ("intermediate_size", "moe_intermediate_size", "n_expert"):
        if name in choice:
            sizes[name] = mean(_per_layer(choice[name]))
    return sizes


def _per_layer(value: int | str | list) -> list[int]:
    """The sizes of the layers that have such units; one where all layers agree."""
    values = value if isinstance(value, list) else [value]
    return [n_units(units) for units in values if units is not None]


def _repeated(sizes: list[int], n: int) -> list[int]:
    return sizes if len(sizes) == n else sizes * n
