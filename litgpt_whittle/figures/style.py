"""Shared style of all plots: colours, axes and legend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = ("#2a6fdb", "#e4572e", "#2e9e5b", "#8e44ad", "#d4a017", "#17a2b8")
BLACK, GRAY = "#222222", "#888888"


def new_figure(
    size: tuple[float, float] = (8.5, 5), n_rows: int = 1, n_columns: int = 1, sharey: bool = True, **kwargs: Any
) -> tuple[Any, Any]:
    """Return a figure of a size in inches, and its axes, an array of shape (n_rows, n_columns)."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharey=sharey, **kwargs)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, grid


def save_figure(figure: Any, path: Path) -> None:
    """Save the figure, with the labels of all axes in one legend below the plots."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if handles:
        # an inch holds about 12 letters; a legend column needs the space of 6 more than its label
        n_columns = int(12 * figure.get_figwidth() / (max(map(len, handles)) + 6))
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=min(max(n_columns, 1), 4), frameon=False
        )
    figure.savefig(path, dpi=130)
