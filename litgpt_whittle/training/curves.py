"""A training run's figures: an append-only log, whatever logger was chosen, and the plot that is drawn from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_whittle.files import write_text

if TYPE_CHECKING:
    from litgpt_whittle.pruners.pruning import MapReport
    from litgpt_whittle.repair.walk import LayerReport


class MetricsLog:
    """JSON lines, one per logged step or validation, each with `iter` and `tokens`.

    Args:
        path: The file.
        resume_at: Iterations that the run has done; 0 starts a new file, else what a killed run logged after that
            iteration is dropped, because it will be logged again.
    """

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        self.path = Path(path)
        kept = [row for row in read_metrics(self.path) if row["iter"] <= resume_at] if resume_at else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Appends one line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The log's rows; a last line that a crash cut short is left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def plot_training(metrics_path: Path, png_path: Path) -> None:
    """Draws train and validation loss, and the learning rate, over tokens."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    rows = read_metrics(metrics_path)
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    lines = [
        ("ce", "train, cross-entropy", "-"),
        ("full", "train, full network", "-"),
        ("val_loss", "validation", "o-"),
    ]
    others = dict.fromkeys(key for row in rows for key in row if key.startswith("val_loss/"))
    lines += [(key, f"validation, {key.removeprefix('val_loss/')}", ".-") for key in others]
    for key, label, style in lines:
        points = [(row["tokens"], row[key]) for row in rows if key in row]
        if points:
            loss.plot(*zip(*points), style, label=label, linewidth=1, markersize=4)
    for row in rows:
        if "teacher_val_loss" in row:
            loss.axhline(row["teacher_val_loss"], color="gray", linestyle="--", label="teacher, validation")
    loss.set_ylabel("nats per token")
    if loss.get_legend_handles_labels()[0]:
        loss.legend()
    rates = [(row["tokens"], row["learning_rate"]) for row in rows if "learning_rate" in row]
    if rates:
        rate.plot(*zip(*rates), linewidth=1)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("tokens")
    figure.savefig(png_path, dpi=120)


def plot_repair(layers: Sequence[LayerReport], png_path: Path) -> None:
    """Draws each block's error on held-out tokens, as it was cut and repaired."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(layers))
    axes.plot(places, [layer.before for layer in layers], "o--", color="tab:gray", label="this block as cut")
    axes.plot(places, [layer.after for layer in layers], "o-", color="tab:blue", label="repaired")
    axes.set_xticks(places, [str(layer.layer) for layer in layers])
    axes.set(xlabel="the teacher's layer", ylabel="relative squared error of the stream", yscale="log")
    axes.set_title("The student's stream behind each block, against the teacher's")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(png_path, dpi=120)


def plot_pruning(reports: Sequence[MapReport], png_path: Path) -> None:
    """Draws what each layer's maps lose on calibration data, the mean over its experts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(report.kind for report in reports):
        errors: dict[int, list[float]] = {}
        for report in reports:
            if report.kind == kind and report.error is not None:
                errors.setdefault(report.layer, []).append(report.error)
        axes.plot(list(errors), [sum(own) / len(own) for own in errors.values()], "o-", markersize=4, label=kind)
    axes.set(xlabel="layer", ylabel="relative squared error of the output")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.set_title("What pruning takes from each map, on what the pruned model feeds it")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png_path, dpi=120)
