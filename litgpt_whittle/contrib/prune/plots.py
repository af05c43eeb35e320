"""Figure of `litgpt prune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from litgpt_whittle.contrib.prune.pruning import MapReport
from litgpt_whittle.figures.style import COLORS, new_figure, save_figure


def plot_pruning(reports: Sequence[MapReport], png_path: Path) -> None:
    """Plot the output error of each layer's pruned linear layers on calibration data, averaged over experts."""
    figure, [[axes]] = new_figure((8.5, 4.8))
    for i, kind in enumerate(dict.fromkeys(report.kind for report in reports)):
        errors: dict[int, list[float]] = {}
        for report in reports:
            if report.kind == kind and report.error is not None:
                errors.setdefault(report.layer, []).append(report.error)
        means = [sum(own) / len(own) for own in errors.values()]
        axes.plot(list(errors), means, "o-", color=COLORS[i % len(COLORS)], markersize=4, label=kind)
    axes.set(xlabel="layer", ylabel="relative squared error of the output")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_title("Relative error of each pruned map on the pruned model's own inputs", loc="left")
    save_figure(figure, png_path)
