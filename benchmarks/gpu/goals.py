"""Goals of the figures, figures that follow from several steps, and the table of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Rows = Iterable[Mapping[str, Any]]
"""Lines of results.jsonl"""


@dataclass(frozen=True)
class Goal:
    """Bounds of a figure; None for no bound."""

    least: float | None = None
    most: float | None = None

    def is_met(self, value: float) -> bool:
        """Return whether a value is within the bounds."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def share(self, value: float) -> float | None:
        """Return a value relative to the bound; None if there are two bounds."""
        if self.least is not None and self.most is not None:
            return None
        return value / (self.most if self.least is None else self.least)

    def __str__(self) -> str:
        if self.least is None:
            return f"<= {self.most:g}"
        return f">= {self.least:g}" if self.most is None else f"{self.least:g} to {self.most:g}"


TOLERANCES = {
    "whole_logits": 1e-4,
    "logits_inside": 1e-4,
    "logits_extracted": 1e-4,
    "perplexity": 2e-3,
    "kl": 2e-3,
    "repaired_perplexity": 5e-2,
    "repair_errors": 5e-2,
    "importance": 1e-2,
    "pruning_errors": 5e-2,
    "distillation_losses": 2e-3,
    "supernet_losses": 5e-3,
}
"""Allowed relative differences from the CPU; fits, and selections by size, amplify rounding"""

VOCABULARIES = ("v50k", "v128k")
LOSSES = ("ce", "kl", "ce_kl")
"""Cases of the step `head`"""

TOGETHER = "together"
"""Step's name for figures that follow from several steps"""

GOALS: dict[tuple[str, str], Goal] = {
    ("distill", "of_peak"): Goal(least=0.45),
    ("distill", "planned_over_peak"): Goal(0.9, 1.1),
    (TOGETHER, "distill_over_pretrain_and_teacher"): Goal(most=1.05),
    ("search", "ratio"): Goal(least=0.9),
    ("repair_250k", "seconds"): Goal(most=15),
    ("repair_1m", "seconds"): Goal(most=60),
    **{("head", f"{case}_{task}_over_liger"): Goal(most=1) for case in VOCABULARIES for task in LOSSES},
    **{("values", name): Goal(most=tolerance) for name, tolerance in TOLERANCES.items()},
    ("fsdp", "sharded_difference"): Goal(most=0.02),
    ("fsdp", "compiled_difference"): Goal(most=0.02),
}
"""Goals by step and figure. Times and shares are for one H100 or H200 at the full sizes"""

FOR_ANY_SIZE = ("values", "fsdp")
"""Steps whose goals hold with --tiny, too"""


def together(rows: Rows) -> dict[str, float]:
    """Return the figures that follow from several steps, as far as these are measured."""
    figures = {row["step"]: row.get("figures", {}) for row in rows}
    seconds = {name: figures.get(name, {}).get("step_s") for name in ("distill", "pretrain")}
    forward = figures.get("teacher", {})
    # the faster one, so that compiling the teacher does not make the comparison easier
    teacher = min((forward[name] for name in ("eager_s", "compiled_s") if name in forward), default=None)
    if None in (*seconds.values(), teacher):
        return {}
    return {"distill_over_pretrain_and_teacher": round(seconds["distill"] / (seconds["pretrain"] + teacher), 3)}


def table(rows: Rows) -> str:
    """Return all figures with their goals as a table, and the goals that were not measured.

    If a step ran several times, its last line counts.
    """
    rows = [*{row["step"]: row for row in rows}.values()]
    rows += [{"step": TOGETHER, "tiny": any(row["tiny"] for row in rows), "figures": together(rows)}]
    lines = [("step", "figure", "value", "goal", ""), *(line for row in rows for line in _lines(row))]
    measured = {(step, figure) for step, figure, *_ in lines}
    lines += [(*key, "", str(goal), "not measured") for key, goal in GOALS.items() if key not in measured]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join("  ".join(f"{cell:<{n}}" for cell, n in zip(line, [*widths, 0])).rstrip() for line in lines)


def _lines(row: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Return the table's lines for one step."""
    step, lines = row["step"], []
    for name, value in row.get("figures", {}).items():
        goal = GOALS.get((step, name))
        if value is None or (isinstance(value, list | dict) and not value):
            continue
        holds = goal is not None and (step in FOR_ANY_SIZE or not row["tiny"])
        verdict = ("met" if goal.is_met(value) else "missed") if holds else ""
        if holds and (share := goal.share(value)) is not None:
            verdict += f", {share:.2g} x the goal"
        lines.append((step, name, _text(value), "" if goal is None else str(goal), verdict))
    for kind in ("error", "skipped"):
        if kind in row:
            lines.append((step, kind, row[kind][:100], "", ""))
    return lines


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)[:100]
