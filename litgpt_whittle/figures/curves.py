"""Plots of a model's training, repair and pruning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_whittle.figures.style import (
    BLACK,
    COLORS,
    GRAY,
    new_figure,
    save_figure,
)
from litgpt_whittle.metrics_log import read_metrics

if TYPE_CHECKING:
    from litgpt_whittle.repair.repaired import LayerReport


MOST_LABELS = 24
"""Maximum number of layer labels along an axis; with more layers, only every n-th layer is labelled"""


def plot_training(metrics_path: Path, png_path: Path) -> None:
    """Plot train and validation loss, and the learning rate, over tokens."""
    from matplotlib.ticker import EngFormatter

    rows = read_metrics(metrics_path)
    figure, [[loss], [rate]] = new_figure((8.5, 6), 2, 1, sharey=False, sharex=True, height_ratios=[3, 1])
    found = {key: [(row["tokens"], row[key]) for row in rows if key in row] for key in _keys(rows)}
    others = [key for key in found if key.startswith("val_loss/")]
    validated = {"val_loss": "validation"} | {key: f"validation, {key.partition('/')[2]}" for key in others}
    # training losses, which are noisier, are drawn thinner and below the validation losses
    for key, label in {"ce": "train, cross-entropy", "full": "train, full network"}.items():
        if found.get(key):
            loss.plot(*zip(*found[key]), color=GRAY, linewidth=0.8, alpha=0.7, label=label)
    for i, (key, label) in enumerate(validated.items()):
        if found.get(key):
            loss.plot(*zip(*found[key]), "o-", color=COLORS[i % len(COLORS)], linewidth=1.5, markersize=4, label=label)
    taught = found.get("teacher_val_loss")
    if taught:
        loss.axhline(taught[-1][1], color=BLACK, linestyle="--", linewidth=1, label=f"teacher: {taught[-1][1]:.3f}")
    loss.set_ylabel("nats per token")
    loss.set_title(_result(found.get("val_loss", [])), loc="left")
    rate.set_ylabel("learning rate")
    if found.get("learning_rate"):
        rate.plot(*zip(*found["learning_rate"]), color=COLORS[0], linewidth=1)
        rate.set_ylim(bottom=0)
    rate.set_xlabel("tokens")
    rate.xaxis.set_major_formatter(EngFormatter(sep=""))
    save_figure(figure, png_path)


def _keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _result(validations: Sequence[tuple[int, float]]) -> str:
    if not validations:
        return ""
    tokens, loss = validations[-1]
    return f"{loss:.3f} nats per token (perplexity {math.exp(min(loss, 700)):,.2f}) after {tokens:,} tokens"


def plot_repair(layers: Sequence[LayerReport], png_path: Path) -> None:
    """Plot each block's relative squared error on held-out tokens, without repair and after its repair.

    Leading blocks that are copies of the teacher's have no error and are left out.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    n_copies = next((i for i, layer in enumerate(layers) if layer.before > 0), 0)
    shown = layers[n_copies:]
    figure, [[axes]] = new_figure((8.5, 4.8))
    places = range(len(shown))
    axes.plot(places, [layer.before for layer in shown], "o--", color=GRAY, label="this block, plain cut")
    axes.plot(places, [layer.after for layer in shown], "o-", color=COLORS[0], label="repaired")
    step = -(-len(shown) // MOST_LABELS)
    axes.set_xticks(places[::step], [str(layer.layer) for layer in shown[::step]])
    copies = f" (layers {layers[0].layer} to {layers[n_copies - 1].layer} are the teacher's own)" if n_copies else ""
    axes.set(xlabel=f"the teacher's layer{copies}", ylabel="squared error relative to each token's size")
    errors = [error for layer in shown for error in (layer.before, layer.after) if 0 < error < math.inf]
    if errors:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100 * error:.3g}%"))
        axes.yaxis.set_minor_locator(NullLocator())
        # a tick below and above all points
        axes.set_ylim(_mark_below(min(errors)), 1 / _mark_below(1 / max(errors)))
    axes.set_title("Error of the student's residual stream after each block", loc="left")
    save_figure(figure, png_path)


def _mark_below(value: float) -> float:
    """Return the largest of 1, 2 and 5 times a power of ten below a value."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(factor * power for factor in (0.5, 1, 2, 5) if factor * power < value)
