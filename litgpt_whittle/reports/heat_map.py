"""Plot the importance of a teacher's units and layers: a heat map over depth per kind of unit, and bars for layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt.config import Config

from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.ranking.scores import Scores

N_BINS = 128
"""Maximum number of columns in a panel; with more units, neighbours in the order are averaged"""

FEW = 16
"""Maximum number of units to label by their indices"""

MANY_LAYERS = 48
"""Number of layers beyond which numbers would not be legible"""

TITLES = {
    "activation": "their outputs",
    "magnitude": "the size of their weights",
    "taylor": "the first-order change of the loss without them",
}
LAYER_TITLES = {"block_influence": "block influence", "perplexity": "perplexity without it"}
SUBLAYER_TITLES = {"attn": "attention influence", "mlp": "MLP influence"}
"""Titles of the block influence of sub-layers"""


def layer_columns(scores: Scores) -> dict[str, torch.Tensor]:
    """Return the scores of layers and of their sub-layers by title, in the order of the columns to show."""
    columns = {}
    for name, values in scores.layers.items():
        columns[LAYER_TITLES[name]] = values
        if name == "block_influence":
            columns |= {SUBLAYER_TITLES[part]: influence for part, influence in scores.sublayers.items()}
    return columns


def plot_importance(ranking: Ranking, path: Path) -> None:
    """Plot the scores of units, most important on the left, and the scores of layers.

    Colours are relative to the mean of each kind and layer, so that layers of any scale can be compared. Channels,
    which all layers share, have one order; other units are sorted in each layer.
    """
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    panels, bars = _panels(ranking), layer_columns(ranking.scores)
    widths = [1.0 if units.shape[1] > FEW else 0.5 for units, _ in panels.values()] + [0.42] * len(bars)
    n_layer = ranking.teacher.n_layer
    figure = Figure(figsize=(1.6 + 3.3 * sum(widths), min(max(1.9 + 0.22 * n_layer, 3.4), 14)), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths, sharey=True)
    shades = _Shades([scores for _, scores in panels.values()])
    for ax, (title, (units, scores)) in zip(axes, panels.items()):
        image = _draw_panel(ax, units, scores, shades)
        ax.set_title(title, fontsize=10)
    axes[0].set_ylabel("layer")
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    for ax, (title, values) in zip(axes[len(panels) :], bars.items()):
        _draw_bars(ax, values.numpy(), ranking.scores.perplexity if title == LAYER_TITLES["perplexity"] else None)
        ax.set_title(title, fontsize=10)
    shades.add_bar(figure, image, axes[: len(panels)])
    figure.suptitle(f"{ranking.teacher.name}: units by {TITLES[ranking.metric]}", x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, dpi=130)


def _panels(ranking: Ranking) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return, by title, the ordered units and their scores relative to the mean, each of shape (n_layer, n_units).

    Scores are NaN in layers without such units. Kinds with a single unit are left out.
    """
    teacher, order, scores = ranking.teacher, ranking.order, ranking.scores.units[ranking.metric]
    channels = np.tile(order.n_embd, (teacher.n_layer, 1))
    panels = {f"{teacher.n_embd:,} channels": (channels, _relative(scores.n_embd[:-1].numpy()[:, order.n_embd]))}
    for kind, title in unit_titles(teacher).items():
        size = max((len(units[kind]) for units in order.layers if kind in units), default=0)
        if size < 2:
            continue
        units, sorted_scores = np.zeros((teacher.n_layer, size), int), np.full((teacher.n_layer, size), np.nan)
        for layer, own in enumerate(scores.layers):
            if kind in own:
                units[layer] = order.layers[layer][kind]
                sorted_scores[layer] = own[kind].numpy()[units[layer]]
        panels[f"{size:,} {title}"] = (units, _relative(sorted_scores))
    return panels


def unit_titles(teacher: Config) -> dict[str, str]:
    """Return titles for the kinds of units, by the names of a sub-network's fields."""
    is_grouped = teacher.n_query_groups != teacher.n_head
    experts_only = teacher.n_expert and teacher.moe_intermediate_size is None
    return {
        "n_query_groups": "query groups" if is_grouped else "heads",
        "heads_per_group": "heads of each group",
        "intermediate_size": "neurons of each expert" if experts_only else "neurons",
        "moe_intermediate_size": "neurons of each expert",
        "n_expert": "experts",
    }


def _relative(scores: np.ndarray) -> np.ndarray:
    return scores / np.maximum(scores.mean(1, keepdims=True), 1e-30)


def _binned(scores: np.ndarray) -> np.ndarray:
    n = scores.shape[1]
    edges = np.linspace(0, n, min(n, N_BINS) + 1).astype(int)
    return np.stack([scores[:, first:stop].mean(1) for first, stop in zip(edges, edges[1:])], 1)


def _draw_panel(ax: Any, units: np.ndarray, scores: np.ndarray, shades: _Shades) -> Any:
    n_layer, n = units.shape
    extent = (0, n, n_layer - 0.5, -0.5)
    image = ax.imshow(_binned(scores), aspect="auto", interpolation="nearest", extent=extent, **shades.settings)
    ax.set_facecolor("0.85")
    ax.set_xlabel("most important first", fontsize=8)
    ax.tick_params(labelsize=8, length=2)
    if n > FEW:
        ax.xaxis.get_major_locator().set_params(nbins=5, integer=True)
        return image
    ax.set_xticks([])
    for layer, place in np.argwhere(np.isfinite(scores)) if n_layer <= MANY_LAYERS else ():
        color = "white" if shades.is_dark(scores[layer, place]) else "0.25"
        ax.text(place + 0.5, layer, str(units[layer, place]), ha="center", va="center", fontsize=6.5, color=color)
    return image


def _draw_bars(ax: Any, values: np.ndarray, line: float | None) -> None:
    """Draw a bar per layer, on a log scale if values differ by more than 8 times, and a line for the whole model."""
    from matplotlib.ticker import NullFormatter

    ax.spines[["top", "right"]].set_visible(False)
    shown = np.where(np.isfinite(values), values, np.nan)
    finite = [value for value in (*shown, line) if value is not None and np.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 8 * min(finite):
        ax.set_xscale("log")
        ax.set_xlim(min(finite) / 1.6, max(finite) * 1.3)
        ax.xaxis.set_major_formatter("{x:,g}")
        ax.xaxis.set_minor_formatter(NullFormatter())  # values below a decade would get overlapping labels
        ax.xaxis.get_major_locator().set_params(numticks=4)
    ax.barh(range(len(values)), shown, color="#7a8ca5", height=0.7)
    for layer, value in enumerate(values) if len(values) <= MANY_LAYERS else ():
        text = f"{value:,.0f}" if 1000 <= value < np.inf else f"{value:.3g}"
        ax.text(1.02, layer, text, transform=ax.get_yaxis_transform(), va="center", fontsize=6.5, color="0.25")
    if line is not None:
        ax.axvline(line, color="#222222", linewidth=1, linestyle=":")
        ax.set_xlabel(f"dotted: the whole model, {line:.3g}", fontsize=8)
    ax.tick_params(labelsize=8, length=2)


class _Shades:
    """Colour scale shared by all panels: white at the mean, red above it, blue below."""

    def __init__(self, panels: list[np.ndarray]) -> None:
        from matplotlib.colors import LogNorm

        seen = np.concatenate([_binned(scores).ravel() for scores in panels])
        off = np.abs(np.log2(np.clip(seen[np.isfinite(seen)], 2.0**-6, 2.0**6)))
        self.octaves = max(1.0, float(np.quantile(off, 0.99)))
        self.settings = {"cmap": "RdBu_r", "norm": LogNorm(2.0**-self.octaves, 2.0**self.octaves, clip=True)}

    def is_dark(self, score: float) -> bool:
        return abs(np.log2(max(score, 1e-9))) > 0.65 * self.octaves

    def add_bar(self, figure: Any, image: Any, axes: Any) -> None:
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=50, pad=0.02)
        most = int(self.octaves)
        powers = range(-most, most + 1)
        bar.set_ticks([2.0**k for k in powers], labels=[f"1/{2**-k}" if k < 0 else f"{2**k}" for k in powers])
        bar.minorticks_off()
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, length=2)
        bar.set_label("times the mean of the layer", fontsize=8)
