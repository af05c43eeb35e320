"""What a search found, for people: plots and a table, drawn from its journal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litgpt.config import Config

from litgpt_whittle.bins import short
from litgpt_whittle.journal import Evaluation
from litgpt_whittle.subnet import SubNet

COLORS = ("#2a6fdb", "#e4572e", "#2e9e5b", "#8e44ad", "#d4a017", "#17a2b8")

Bests = dict[str, Evaluation]


def best_of(evaluations: Sequence[Evaluation], score: str = "perplexity") -> Bests:
    """The best evaluation in every bin that has one, the earlier one of equals."""
    bests: Bests = {}
    for evaluation in evaluations:
        best = bests.get(evaluation.bin)
        if math.isfinite(evaluation.score(score)) and (best is None or evaluation.score(score) < best.score(score)):
            bests[evaluation.bin] = evaluation
    return {bin: bests[bin] for bin in dict.fromkeys(e.bin for e in evaluations) if bin in bests}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats in both coordinates (lower is better), along the first one."""
    front: list[int] = []
    lowest = math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < lowest:
            front.append(i)
            lowest = points[i][1]
    return front


def plot_search(evaluations: Sequence[Evaluation], path: Path, score: str = "perplexity") -> None:
    """Draws every candidate's score and the best so far over the evaluations, one colour per bin."""
    figure, axes = _figure()
    bins = list(dict.fromkeys(e.bin for e in evaluations))
    for bin, color in zip(bins, _colors(len(bins))):
        own = [(i, e.score(score)) for i, e in enumerate((e for e in evaluations if e.bin == bin), 1)]
        finite = [(i, value) for i, value in own if math.isfinite(value)]
        axes.scatter(*_columns(finite), s=11, color=color, alpha=0.3, linewidths=0, label=_only(bins, "candidates"))
        steps: list[tuple[int, float]] = []
        for i, value in finite:
            steps.append((i, min(value, steps[-1][1] if steps else math.inf)))
        if steps:
            steps.append((len(own), steps[-1][1]))
            label = "best so far" if len(bins) == 1 else f"best of {bin}"
            axes.step(*_columns(steps), where="post", color=color, linewidth=2, label=label)
            axes.annotate(
                _number(steps[-1][1]),
                steps[-1],
                xytext=(-4, -6),
                textcoords="offset points",
                ha="right",
                va="top",
                color=color,
                fontweight="bold",
            )
    axes.set_xlabel("evaluations" if len(bins) == 1 else "evaluations per bin")
    axes.set_title("Search: the best candidate so far", loc="left")
    _score_axis(axes, evaluations, score)
    _save(figure, axes, path)


def plot_candidates(evaluations: Sequence[Evaluation], path: Path, score: str = "perplexity") -> None:
    """Draws every candidate's score over its parameters, marks the front and each bin's best."""
    figure, axes = _figure()
    found = [e for e in evaluations if math.isfinite(e.score(score))]
    points = [(e.n_params, e.score(score)) for e in found]
    if found:
        # later candidates darker, so that one sees the search move
        order = [e.index for e in found]
        dots = axes.scatter(
            *_columns(points), c=order, cmap="Blues", vmin=-0.4 * max(max(order), 1), s=16, linewidths=0
        )
        bar = figure.colorbar(dots, ax=axes, label="evaluation", pad=0.015)
        bar.ax.set_ylim(0, max(max(order), 1))
        bar.outline.set_visible(False)
        front = [points[i] for i in pareto_front(points)]
        axes.step(*_columns(front), where="post", color=COLORS[1], linewidth=1.2, alpha=0.7)
        axes.scatter(*_columns(front), color=COLORS[1], s=24, zorder=3, label="front: none is smaller and better")
        bests = [(e.n_params, e.score(score)) for e in best_of(found, score).values()]
        axes.scatter(*_columns(bests), marker="*", color="#222222", s=150, zorder=4, label="best")
    axes.xaxis.set_major_formatter(lambda n, _: _millions(n))
    axes.xaxis.get_major_locator().set_params(nbins=7)
    axes.set_xlabel("parameters")
    axes.set_title("All candidates", loc="left")
    _score_axis(axes, evaluations, score)
    _save(figure, axes, path)


def table(teacher: Config, evaluations: Sequence[Evaluation], score: str = "perplexity") -> str:
    """The best of each bin, as text of at most 100 columns or so."""
    rows = [["bin", score, "parameters", "layers", "channels", "heads", "neurons", "found at", "evaluated"]]
    for bin, best in best_of(evaluations, score).items():
        subnet = SubNet.from_dict(teacher, best.subnet)
        layers = [subnet.layer(i) for i in range(len(subnet))]
        own = [e.index for e in evaluations if e.bin == bin]
        heads = [len(keep.n_query_groups) * len(keep.heads_per_group) for keep in layers]
        rows.append(
            [
                bin,
                _number(best.score(score)),
                f"{best.n_params:,}",
                f"{len(subnet)}/{teacher.n_layer}",
                f"{len(subnet.n_embd)}/{teacher.n_embd}",
                f"{_span(heads)}/{teacher.n_head}",
                f"{_span([len(keep.intermediate_size) for keep in layers])}/{_width(teacher)}",
                str(own.index(best.index) + 1),
                str(len(own)),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _score_axis(axes: Any, evaluations: Sequence[Evaluation], score: str) -> None:
    """A logarithmic axis where scores span more than a factor of three, with plain numbers on it."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    scores = [value for e in evaluations if math.isfinite(value := e.score(score))]
    if scores and min(scores) > 0 and max(scores) > 3 * min(scores):
        axes.set_yscale("log")
        subs = (1, 2, 5) if max(scores) < 300 * min(scores) else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_ylabel(score)
    if failed := len(evaluations) - len(scores):
        axes.text(1, 1.02, f"{failed} failed", transform=axes.transAxes, ha="right", color="#888888", fontsize=9)


def _save(figure: Any, axes: Any, path: Path) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=130)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _colors(n: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]


def _only(bins: list[str], label: str) -> str | None:
    return label if len(bins) == 1 else None


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _millions(n: float) -> str:
    return short(round(n, -max(0, len(str(int(max(n, 1)))) - 4)).__int__())


def _span(sizes: list[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)}-{max(sizes)}"


def _width(teacher: Config) -> int:
    return teacher.moe_intermediate_size or teacher.intermediate_size
