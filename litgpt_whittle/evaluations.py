"""Summaries of a search's evaluations: the best of each bin, Pareto fronts, and sizes of candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from litgpt_whittle.journal import Evaluation
from litgpt_whittle.unit_index import n_units

Bests = dict[str, Evaluation]


def best_of(evaluations: Sequence[Evaluation], score: str = "perplexity") -> Bests:
    """Return the best evaluation of every bin; of equal ones, the earliest. Skip candidates that a race dropped."""
    bests: Bests = {}
    for evaluation in scored(evaluations, score):
        if evaluation.dropped:
            continue
        best = bests.get(evaluation.bin)
        if best is None or evaluation.score(score) < best.score(score):
            bests[evaluation.bin] = evaluation
    return {bin: bests[bin] for bin in bins_of(evaluations) if bin in bests}


def scored(evaluations: Sequence[Evaluation], score: str = "perplexity") -> list[Evaluation]:
    """Return the evaluations with a finite score."""
    return [evaluation for evaluation in evaluations if math.isfinite(evaluation.score(score))]


def bins_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the bins of the candidates, in order of first appearance."""
    return list(dict.fromkeys(evaluation.bin for evaluation in evaluations))


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the non-dominated points (lower is better), sorted by the first coordinate.

    Of equal points, only the first is kept.
    """
    front: list[int] = []
    # a dominating point comes earlier in this order
    for i in sorted(range(len(points)), key=lambda i: tuple(points[i])):
        if not any(all(a <= b for a, b in zip(points[j], points[i])) for j in front):
            front.append(i)
    return front


def fronts_of(evaluations: Sequence[Evaluation], objectives: Sequence[str]) -> dict[str, list[Evaluation]]:
    """Return the Pareto front of every bin, sorted by the first objective; of equal evaluations, the earliest."""
    fronts: dict[str, list[Evaluation]] = {bin: [] for bin in bins_of(evaluations)}
    for bin, front in fronts.items():
        own = [(e, [e.measure(name) for name in objectives]) for e in evaluations if e.bin == bin]
        own = [(e, point) for e, point in own if all(map(math.isfinite, point))]
        front += [own[i][0] for i in pareto_front([point for _, point in own])]
    return {bin: front for bin, front in fronts.items() if front}


def prediction_tau(evaluations: Sequence[Evaluation], score: str = "perplexity") -> tuple[float, int]:
    """Return Kendall's τ between a surrogate's predictions and the measured scores, and the number of candidates.

    τ is NaN if there are fewer than two candidates, all predictions are equal, or all scores are equal.
    """
    from scipy.stats import kendalltau

    both = scored(scored(evaluations, score), "predicted")
    predicted, measured = [e.score("predicted") for e in both], [e.score(score) for e in both]
    if len(set(predicted)) < 2 or len(set(measured)) < 2:
        return math.nan, len(both)
    return float(kendalltau(predicted, measured).statistic), len(both)


def mean_sizes(choice: Mapping[str, Any]) -> dict[str, float]:
    """Return a sub-network's sizes by litgpt's names, as means over the layers that have such units.

    Reads the output of `SubNet.to_dict` directly, since building a `SubNet` for each of many candidates is slow.
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
    """Return the sizes of the layers that have such units; a single size if all layers share it."""
    values = value if isinstance(value, list) else [value]
    return [n_units(units) for units in values if units is not None]


def _repeated(sizes: list[int], n: int) -> list[int]:
    return sizes if len(sizes) == n else sizes * n
