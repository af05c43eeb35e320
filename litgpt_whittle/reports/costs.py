"""Heat map of the costs of each layer's alternatives: to drop the layer or a sub-layer, or to keep fewer units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from litgpt.config import Config

from litgpt_whittle.journal import (
    Evaluation,
    read_journal,
)
from litgpt_whittle.reports.heat_map import MANY_LAYERS, unit_titles
from litgpt_whittle.searching.measuring import MEASUREMENTS, as_scored
from litgpt_whittle.spaces.alternatives import DROPPED, SUBLAYER_TITLES, Alternative
from litgpt_whittle.spaces.sizes import EVERY
from litgpt_whittle.strategies.integer_program import WHOLE, costs_of

Costs = Mapping[Alternative, float]

_FEWEST = 3
"""Minimum width of a panel in columns, so that its title fits"""


def read_costs(out_dir: Path, teacher: Config, score: str) -> tuple[dict[Alternative, float], str]:
    """Return the costs of the alternatives that a search has measured so far, and their unit.

    A cost is the increase of the loss over the whole teacher's; without the teacher's score, the result is empty.

    Args:
        out_dir: The search's folder.
        teacher: The teacher's config.
        score: The name of the score that the search minimises.
    """
    path = Path(out_dir) / MEASUREMENTS
    evaluations: Sequence[Evaluation] = read_journal(path)[1] if path.is_file() else []
    measured = as_scored(evaluations, score, teacher)
    if WHOLE not in measured or not math.isfinite(measured[WHOLE].score):
        return {}, ""
    found = {name: Alternative.parse(name) for name in measured}
    alternatives = [alternative for alternative in found.values() if alternative is not None]
    unit = "nats per token" if "nll" in measured[WHOLE].measures else score
    return dict(zip(alternatives, costs_of(measured, alternatives).tolist())), unit


def plot_costs(costs: Costs, path: Path, teacher: Config, unit: str) -> None:
    """Plot the costs, with a row per layer, a column per size and a panel per kind of unit.

    Args:
        costs: Increase of the loss by each alternative, as returned by `read_costs`.
        path: The PNG file.
        teacher: The teacher's config.
        unit: Unit of the costs.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import MaxNLocator

    panels = _panels(costs, teacher)
    widths = [max(grid.shape[1], _FEWEST) for _, _, grid in panels]
    size = (2.2 + 0.55 * sum(widths), min(max(2.2 + 0.22 * teacher.n_layer, 3.4), 14))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    finite = [cost for cost in costs.values() if math.isfinite(cost)]
    # a few alternatives cost many times more than the rest and are clipped to the darkest colour
    norm = PowerNorm(0.5, 0.0, max(float(np.quantile(finite, 0.98)) if finite else 0.0, 1e-6), clip=True)
    for ax, (title, labels, grid) in zip(axes, panels):
        image = ax.imshow(grid, aspect="auto", interpolation="nearest", cmap="Reds", norm=norm)
        ax.set_facecolor("0.85")
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(len(labels)), labels=labels)
        ax.tick_params(labelsize=8, length=2)
        ax.yaxis.get_major_locator().set_params(integer=True)
        if len(grid) == 1 or ax is not axes[0]:
            ax.set_yticks([])
        if len(grid) <= MANY_LAYERS:
            _write_numbers(ax, grid, norm)
    axes[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=50, pad=0.02, extend="max")
    bar.locator = MaxNLocator(5, prune="upper")
    bar.update_ticks()
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.set_label(f"increase by this cut alone, {unit}", fontsize=8)
    figure.suptitle("The cost of each layer's alternatives", x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, dpi=130)


def _panels(costs: Costs, teacher: Config) -> list[tuple[str, list[str], np.ndarray]]:
    """Return each panel's title, column labels and costs, shape (n_layer or 1, n_columns), NaN if not measured."""
    titles = {DROPPED: "layer", **SUBLAYER_TITLES, **unit_titles(teacher)}
    titles["n_expert"] = "experts of all layers"
    panels = []
    for name, title in titles.items():
        own = {each: cost for each, cost in costs.items() if each.name == name}
        if not own:
            continue
        sizes = sorted({each.size for each in own}, reverse=True)
        n_rows = 1 if any(each.layer == EVERY for each in own) else teacher.n_layer
        grid = np.full((n_rows, len(sizes)), np.nan)
        for each, cost in own.items():
            row = 0 if each.layer == EVERY else each.layer
            grid[row, sizes.index(each.size)] = cost if math.isfinite(cost) else math.nan
        panels.append((title, ["dropped"] if sizes == [0] else [f"{size:,}" for size in sizes], grid))
    return panels


def _write_numbers(ax: Any, grid: np.ndarray, norm: Any) -> None:
    for row, column in np.argwhere(np.isfinite(grid)):
        cost = grid[row, column]
        digits = 1 if abs(cost) >= 10 else 2 if abs(cost) >= 1 else 3
        text = f"{round(cost, digits) + 0.0:.{digits}f}".replace("-", "−")
        color = "white" if norm(cost) > 0.6 else "0.25"
        ax.text(column, row, text, ha="center", va="center", fontsize=6.5, color=color)
