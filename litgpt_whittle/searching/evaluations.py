"""What a search's evaluations say: the best of each bin, the front, and the sizes of candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from litgpt_whittle.keep import n_units
from litgpt_whittle.searching.journal import Evaluation

Bests = dict[str, Evaluation]


def best_of(evaluations: Sequence[Evaluation], score: str = "perplexity") -> Bests:
    """The best evaluation in every bin that has one, the earlier one of equals; none that a race has dropped."""
    bests: Bests = {}
    for evaluation in scored(evaluations, score):
        if evaluation.dropped:
            continue
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


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other one beats in all coordinates (lower is better), along the first one.

    Of equal points the first one.
    """
    front: list[int] = []
    # what beats a point comes before it in this order
    for i in sorted(range(len(points)), key=lambda i: tuple(points[i])):
        if not any(all(a <= b for a, b in zip(points[j], points[i])) for j in front):
            front.append(i)
    return front


def fronts_of(evaluations: Sequence[Evaluation], objectives: Sequence[str]) -> dict[str, list[Evaluation]]:
    """The front of every bin that has one: of equally good evaluations the earliest, along the first objective."""
    fronts: dict[str, list[Evaluation]] = {bin: [] for bin in bins_of(evaluations)}
    for bin, front in fronts.items():
        own = [(e, [e.measure(name) for name in objectives]) for e in evaluations if e.bin == bin]
        own = [(e, point) for e, point in own if all(map(math.isfinite, point))]
        front += [own[i][0] for i in pareto_front([point for _, point in own])]
    return {bin: front for bin, front in fronts.items() if front}


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
