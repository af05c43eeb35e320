"""Plots of a search's evaluations: progress, candidates, fronts, dimensions and predictions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litgpt_whittle.evaluations import (
    best_of,
    bins_of,
    fronts_of,
    mean_sizes,
    pareto_front,
    prediction_tau,
    scored,
)
from litgpt_whittle.figures.style import (
    BLACK,
    COLORS,
    GRAY,
    new_figure,
    save_figure,
)
from litgpt_whittle.journal import Evaluation
from litgpt_whittle.metrics import MEASURES
from litgpt_whittle.quantities import format_amount
from litgpt_whittle.spaces.bins import short

Points = Sequence[tuple[float, float]]


def plot_search(evaluations: Sequence[Evaluation], path: Path, score: str = "perplexity") -> None:
    """Plot every candidate's score and the best so far over the evaluations, one colour per bin."""
    figure, [[axes]] = new_figure()
    bins = bins_of(evaluations)
    for bin, color in _colored(bins):
        own = list(enumerate((e for e in evaluations if e.bin == bin), 1))
        finite = [(i, e.score(score)) for i, e in own if math.isfinite(e.score(score))]
        seen_whole = [(i, e.score(score)) for i, e in own if not e.dropped and math.isfinite(e.score(score))]
        label = "candidates" if len(bins) == 1 else None
        axes.scatter(*_columns(finite), s=11, color=color, alpha=0.3, linewidths=0, label=label)
        steps: list[tuple[float, float]] = []
        for i, value in seen_whole:
            steps.append((i, min(value, steps[-1][1] if steps else math.inf)))
        if steps:
            steps.append((len(own), steps[-1][1]))
            label = f"best so far: {number(steps[-1][1])}" if len(bins) == 1 else f"{bin}: {number(steps[-1][1])}"
            axes.step(*_columns(steps), where="post", color=color, linewidth=2, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("evaluations" if len(bins) == 1 else "evaluations per bin")
    axes.set_title(f"The best of {_n(evaluations, 'candidate')} so far", loc="left")
    score_axis(axes.yaxis, [e.score(score) for e in scored(evaluations, score)], score)
    _note_failures(axes, evaluations, score)
    save_figure(figure, path)


def plot_candidates(evaluations: Sequence[Evaluation], path: Path, score: str = "perplexity") -> None:
    """Plot every candidate's score over its parameters, and mark the front and each bin's best."""
    figure, [[axes]] = new_figure()
    found = scored(evaluations, score)
    points = [(e.n_params, e.score(score)) for e in found]
    seen_whole = [(e.n_params, e.score(score)) for e in found if not e.dropped]
    front = [seen_whole[i] for i in pareto_front(seen_whole)]
    if found:
        # later candidates are darker, to show the progress of the search
        order = [e.index + 1 for e in found]
        last = max(*order, 2)
        dots = axes.scatter(*_columns(points), c=order, cmap="Blues", vmin=-0.4 * last, vmax=last, s=16, linewidths=0)
        bar = figure.colorbar(dots, ax=axes, label="evaluation", pad=0.015)
        bar.ax.set_ylim(1, last)
        bar.locator.set_params(integer=True)
        bar.outline.set_visible(False)
        axes.step(*_columns(front), where="post", color=COLORS[1], linewidth=1.2, alpha=0.7)
        axes.scatter(*_columns(front), color=COLORS[1], s=24, zorder=3, label="front: none is smaller and better")
        bests = [(e.n_params, e.score(score)) for e in best_of(found, score).values()]
        label = "best" if len(bests) == 1 else "best of each bin"
        axes.scatter(*_columns(bests), marker="*", color=BLACK, s=150, zorder=4, label=label)
    axes.xaxis.set_major_formatter(lambda n, _: _millions(n))
    axes.xaxis.get_major_locator().set_params(nbins=7)
    axes.set_xlabel("parameters")
    axes.set_title(f"{_n(found, 'candidate')}, {len(front)} on the front of {score} and parameters", loc="left")
    score_axis(axes.yaxis, [value for _, value in points], score)
    _note_failures(axes, evaluations, score)
    save_figure(figure, path)


def plot_front(evaluations: Sequence[Evaluation], path: Path, objectives: Sequence[str]) -> None:
    """Plot the first objective over each other objective, and mark each bin's front.

    With more than two objectives, points of the front may look dominated in some panels.
    """
    first, *others = objectives
    figure, [row] = new_figure((max(4.4 * len(others), 8.5), 5), 1, len(others))
    fronts = fronts_of(evaluations, objectives)
    for axes, name in zip(row, others):
        points = [(e.measure(name), e.measure(first)) for e in evaluations]
        points = [point for point in points if all(map(math.isfinite, point))]
        axes.scatter(*_columns(points), color=GRAY, s=13, alpha=0.4, linewidths=0, label="candidates")
        for bin, color in _colored(list(fronts)):
            front = sorted((e.measure(name), e.measure(first)) for e in fronts[bin])
            if len(others) == 1:
                axes.step(*_columns(front), where="post", color=color, linewidth=1.2, alpha=0.7)
            label = "front" if len(fronts) == 1 else f"front of {bin}"
            axes.scatter(*_columns(front), color=color, s=24, zorder=3, label=label)
        score_axis(axes.xaxis, [x for x, _ in points], name)
    score_axis(row[0].yaxis, [y for y in (e.measure(first) for e in evaluations) if math.isfinite(y)], first)
    n_on_front = sum(map(len, fronts.values()))
    figure.suptitle(
        f"{n_on_front} of {_n(evaluations, 'candidate')} on the front of {_listed(objectives)}", x=0.01, ha="left"
    )
    save_figure(figure, path)


def plot_dimensions(evaluations: Sequence[Evaluation], path: Path, score: str = "perplexity") -> None:
    """Plot scores over each size that varies, with Spearman's rank correlation of both within each bin.

    Sizes that differ from layer to layer are averaged over a candidate's layers.
    """
    found = scored(evaluations, score)
    sizes = [mean_sizes(e.subnet) for e in found]
    names = list(dict.fromkeys(name for choice in sizes for name in choice))
    fixed = [name for name in names if len({choice.get(name) for choice in sizes}) == 1]
    varying = [name for name in names if name not in fixed]
    n_columns = 2 if len(varying) in (2, 4) else 3
    n_rows = max(-(-len(varying) // n_columns), 1)
    figure, grid = new_figure((max(3.6 * n_columns, 8.5), 3 * n_rows + 0.5), n_rows, n_columns)
    bins = _colored(bins_of(evaluations))
    for axes, name in zip(grid.flat, varying):
        candidates = [(choice[name], e) for choice, e in zip(sizes, found) if name in choice]
        _draw_dimension(axes, name, candidates, bins, score)
    for axes in grid.flat[len(varying) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        score_axis(axes.yaxis, [e.score(score) for e in found], score)
    title = f"Sizes and {score}: ρ is Spearman's rank correlation, ★ the best"
    note = f"\n(the same in all: {', '.join(fixed)})" if fixed else ""
    figure.suptitle(title + note, x=0.01, ha="left")
    save_figure(figure, path)


def _draw_dimension(
    axes: Any, name: str, candidates: list[tuple[float, Evaluation]], bins: list[tuple[str, str]], score: str
) -> None:
    """Plot scores over one size, with a correlation per bin above and a star for its best."""
    bests = best_of([e for _, e in candidates], score)
    bins = [(bin, color) for bin, color in bins if bin in bests]
    for i, (bin, color) in enumerate(bins):
        own = [(size, e) for size, e in candidates if e.bin == bin]
        points = [(size, e.score(score)) for size, e in own]
        axes.scatter(*_columns(points), s=13, color=color, alpha=0.35, linewidths=0)
        star = [point for point, (_, e) in zip(points, own) if e is bests[bin]]
        style = dict(marker="*", color=color, edgecolor=BLACK, linewidth=0.7, s=150, zorder=3)
        axes.scatter(*_columns(star), **style, label=bin if len(bins) > 1 else None)
        height = 1.03 + 0.075 * (len(bins) - 1 - i)
        axes.text(1, height, _correlation(points), transform=axes.transAxes, ha="right", color=color, fontsize=9)
    axes.set_title(name, loc="left", fontsize=11)
    axes.xaxis.get_major_locator().set_params(nbins=5, integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def plot_predictions(evaluations: Sequence[Evaluation], path: Path, score: str = "perplexity") -> None:
    """Plot measured scores over the scores that the surrogate predicted before the evaluation.

    Each of several bins has its own colour and its own τ, since differences between bins are easy to predict.
    """
    figure, [[axes]] = new_figure()
    found = scored(scored(evaluations, score), "predicted")
    points = [(e.score("predicted"), e.score(score)) for e in found]
    bins = bins_of(found)
    for bin, color in _colored(bins):
        own = [e for e in found if e.bin == bin]
        agreement = _agreement(own, score) or "too few"
        label = f"{bin}: {agreement} over {_n(own, 'candidate')}" if len(bins) > 1 else None
        columns = _columns([(e.score("predicted"), e.score(score)) for e in own])
        axes.scatter(*columns, s=16, color=color, alpha=0.5, linewidths=0, label=label)
    ends = [min(map(min, points)), max(map(max, points))] if points else [1, 2]
    axes.plot(ends, ends, color=GRAY, linewidth=1, linestyle="--", label="predicted as measured")
    agreement = f"Kendall's {_agreement(found, score)} over " if len(bins) == 1 and _agreement(found, score) else ""
    axes.set_title(f"The surrogate: {agreement}{_n(points, 'candidate')}", loc="left")
    score_axis(axes.xaxis, ends, f"predicted {score}")
    score_axis(axes.yaxis, ends, f"measured {score}")
    save_figure(figure, path)


def _agreement(evaluations: Sequence[Evaluation], score: str) -> str:
    """Return Kendall's τ of the predictions as a label; empty if it is undefined."""
    tau, _ = prediction_tau(evaluations, score)
    return f"τ = {tau:.2f}".replace("-", "−") if math.isfinite(tau) else ""


def number(value: float, name: str = "perplexity") -> str:
    """Format a score, or a cost in the unit of the measure with this name."""
    if name in MEASURES:
        return format_amount(value, MEASURES[name].unit)
    if abs(value) < 1:  # a loss of tasks, or a share
        return f"{value:.3f}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def score_axis(axis: Any, scores: Sequence[float], label: str) -> None:
    """Format an axis of scores with plain numbers, on a log scale if they span more than a factor of three.

    An axis of costs is linear, with numbers in their unit.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if label not in MEASURES and scores and min(scores) > 0 and max(scores) > 3 * min(scores):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        subs = (1, 2, 5) if max(scores) < 300 * min(scores) else (1,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(7))
    axis.set_major_formatter(lambda value, _: number(value, label) if label in MEASURES else f"{value:,.10g}")
    axis.set_label_text(label)


def _note_failures(axes: Any, evaluations: Sequence[Evaluation], score: str) -> None:
    if failed := len(evaluations) - len(scored(evaluations, score)):
        axes.text(1, 1.02, f"{failed} failed", transform=axes.transAxes, ha="right", color=GRAY, fontsize=9)


def _correlation(points: Points) -> str:
    """Return Spearman's rank correlation as a label; empty if it is undefined or there are fewer than 10 points."""
    from scipy.stats import spearmanr

    if len(points) < 10:
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # if all sizes or all scores are the same
        rho = spearmanr(*_columns(points)).statistic
    return f"ρ = {rho:.2f}".replace("-", "−") if math.isfinite(rho) else ""


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _colored(bins: list[str]) -> list[tuple[str, str]]:
    return [(bin, COLORS[i % len(COLORS)]) for i, bin in enumerate(bins)]


def _n(things: Sequence[Any], name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _millions(n: float) -> str:
    """Format a count to four digits: `389.5M`."""
    return short(round(int(n), -max(0, len(str(int(n))) - 4)))
