"""Report of a search, drawn from its journal: a table, plots, and an HTML page of both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.evaluations import (
    best_of,
    bins_of,
    fronts_of,
    scored,
)
from litgpt_whittle.files import check_writable, to_yaml, write_text
from litgpt_whittle.journal import (
    JOURNAL,
    Evaluation,
    read_journal,
)
from litgpt_whittle.reports.blueprint import plot_architecture, rows
from litgpt_whittle.reports.costs import plot_costs, read_costs
from litgpt_whittle.reports.fronts import folder_name, front_table
from litgpt_whittle.reports.page import Section, code, page, picture, table
from litgpt_whittle.reports.plots import (
    number,
    plot_candidates,
    plot_dimensions,
    plot_front,
    plot_predictions,
    plot_search,
)
from litgpt_whittle.searching.selection import read_results, rung_table
from litgpt_whittle.subnet import SubNet

PAGE = "report.html"

Plot = Callable[[Any, Path, str], None]
"""Draws its first argument into a PNG file, with a label"""

IMPORTANCE = "importance.png"
"""Name of a plot of importance scores, which the page includes if the search's folder has one"""


def write_report(out_dir: Path) -> str:
    """Write `report.html` and its pictures next to a search's journal; the search may still be running.

    Args:
        out_dir: The search's folder.

    Returns:
        A text table of each bin's best, followed by the fronts if there are several objectives.

    Raises:
        UserError: If the folder holds no search, or none of its candidates has a score yet.
    """
    out_dir = Path(out_dir)
    found = Findings.read(out_dir)
    check_writable(out_dir)
    bests = found.bests
    sections = [Section("The best", _summary(found), table(bests)), *draw(found, out_dir)]
    sections.append(Section("Settings", "Settings that determine the scores.", code(to_yaml(found.header))))
    write_text(out_dir / PAGE, page(f"Search of {found.teacher.name}", sections))
    return "\n\n".join(map(as_text, (bests, *found.fronts)))


@dataclass(frozen=True)
class Findings:
    """The contents of a search's journal."""

    teacher: Config
    score: str
    """Name of the score that the search minimises"""
    header: dict[str, Any]
    """Journal header, with everything that the scores depend on"""
    evaluations: list[Evaluation]

    @classmethod
    def read(cls, out_dir: Path) -> Findings:
        """Read a search's journal.

        Raises:
            UserError: If the folder has no journal, another version wrote it, or it has no score yet.
        """
        path = out_dir / JOURNAL
        if not path.is_file():
            raise UserError(
                f"{str(out_dir)!r} is not the folder of a search: it has no {JOURNAL}; pass a search's out_dir"
            )
        header, evaluations = read_journal(path)
        try:
            teacher, score = Config(**header["teacher"].pop("architecture")), header["settings"]["score"]
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{str(path)!r} was written by another version; draw its report with that version"
            ) from None
        if not scored(evaluations, score):
            raise UserError(
                f"{str(path)!r} has no candidate with a score among its {len(evaluations)} evaluations; wait for one"
            )
        return cls(teacher, score, header, evaluations)

    @property
    def bests(self) -> list[list[str]]:
        """Table of each bin's best, headings first."""
        kinds = [row.name for row in rows(SubNet.full(self.teacher))]
        bests = best_of(self.evaluations, self.score)
        has_bits = all("bits_per_byte" in best.scores for best in bests.values())
        lines = [["bin", self.score, *["bits per byte"] * has_bits, "parameters", "layers", "channels", *kinds]]
        lines[0] += ["found at", "evaluated"]
        for bin, best in bests.items():
            subnet = SubNet.from_dict(self.teacher, best.subnet)
            own = [e.index for e in self.evaluations if e.bin == bin]
            line = [bin, number(best.score(self.score))]
            line += [f"{best.score('bits_per_byte'):.4f}"] if has_bits else []
            line += [f"{best.n_params:,}"]
            line += [f"{len(subnet)}/{self.teacher.n_layer}", f"{len(subnet.n_embd)}/{self.teacher.n_embd}"]
            line += [f"{row.span}/{max(row.of)}" for row in rows(subnet)]
            lines.append([*line, str(own.index(best.index) + 1), str(len(own))])
        return lines

    @property
    def objectives(self) -> list[str]:
        """Names of the measures that the strategy minimised."""
        return self.header["settings"].get("objectives", [self.score])

    @property
    def fronts(self) -> list[list[list[str]]]:
        """Tables of the bins' fronts; none for a single objective."""
        fronts = fronts_of(self.evaluations, self.objectives) if len(self.objectives) > 1 else {}
        return [
            front_table(self.teacher, front, self.objectives, folder_name(bin, self.evaluations))
            for bin, front in fronts.items()
        ]


def draw(found: Findings, out_dir: Path) -> list[Section]:
    """Draw all plots for which there is data as PNG files in `out_dir`, and return the page's sections."""
    evaluations, score = found.evaluations, found.score

    def drawn(title: str, text: str, name: str, plot: Plot, what: Any = evaluations, label: str = score) -> Section:
        plot(what, out_dir / name, label)
        return Section(title, text, picture(out_dir / name, title))

    sections = []
    if fronts := found.fronts:
        text = "Candidates that no other candidate of the bin beats in all objectives, sorted by the first objective. "
        text += "A search writes each of them to its own file when it ends."
        plot_front(evaluations, out_dir / "front.png", found.objectives)
        content = picture(out_dir / "front.png", "The front") + "\n".join(map(table, fronts))
        sections.append(Section("The front", text, content))
    text = f"On the front, no other candidate has both fewer parameters and a lower {score}."
    sections.append(drawn("Size and score", text, "candidates.png", plot_candidates))
    text = "A search that still improved at its end is worth continuing: --resume true with more --iterations."
    sections.append(drawn("Progress", text, "search.png", plot_search))
    text = f"If ρ is below 0, candidates with a larger size tend to have a lower {score} than others of their bin. "
    text += "Sizes that differ from layer to layer are averaged over the layers."
    sections.append(drawn("What matters", text, "dimensions.png", plot_dimensions))
    bests = best_of(evaluations, score)
    for bin, best in bests.items():
        name = "architecture.png" if len(bests) == 1 else f"architecture-{bin}.png"
        label = f"The best of {bin}: {score} {number(best.score(score))}, {best.n_params:,} parameters"
        subnet = SubNet.from_dict(found.teacher, best.subnet)
        text = "Kept units in each of the teacher's layers."
        sections.append(drawn(f"Architecture for {bin}", text, name, plot_architecture, subnet, label))
    if any(e.origin for e in evaluations):
        text = "Simple cuts that the search evaluated first, the best of each bin first."
        sections.append(Section("Simple starts", text, table(_starts(found))))
    if scored(scored(evaluations, score), "predicted"):
        text = f"Predictions that the surrogate made before the {score} of a candidate was measured."
        sections.append(drawn("The surrogate", text, "predictions.png", plot_predictions))
    costs, unit = read_costs(out_dir, found.teacher, score)
    if costs:
        text = "The cost of each cut of a single layer of the teacher, measured before the search. "
        text += "Columns are numbers of kept units; paler cells are cheaper."
        plot_costs(costs, out_dir / "costs.png", found.teacher, unit)
        sections.append(Section("Costs", text, picture(out_dir / "costs.png", "Costs")))
    if results := read_results(out_dir):
        text = f"Ranks by {score} before training and by validation loss after it, with the values in brackets."
        sections.append(Section("Selection", text, table(rung_table(results, evaluations, score))))
    if (out_dir / IMPORTANCE).is_file():
        text = "Importance scores of the units in each of the teacher's layers."
        sections.append(Section("Importance", text, picture(out_dir / IMPORTANCE, "Importance")))
    return sections


def _starts(found: Findings) -> list[list[str]]:
    """Return the simple starts as a table, headings first."""
    starts, bins = [e for e in found.evaluations if e.origin], bins_of(found.evaluations)
    starts.sort(key=lambda e: (bins.index(e.bin), e.dropped, e.score(found.score)))
    lines = [["bin", "cut", found.score, "parameters"]]
    return lines + [[e.bin, e.origin or "", number(e.score(found.score)), f"{e.n_params:,}"] for e in starts]


def as_text(table: Sequence[Sequence[str]]) -> str:
    """Format a table for the terminal."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _summary(found: Findings) -> str:
    """Return a text on the number of evaluations in each bin, their time, and the causes of failures."""
    evaluations = found.evaluations
    minutes = sum(e.seconds for e in evaluations) / 60
    tried = ", ".join(f"{sum(e.bin == bin for e in evaluations):,} of {bin}" for bin in bins_of(evaluations))
    text = f"Candidates evaluated: {tried}, which took {minutes:,.1f} minutes."
    failures = Counter(e.error or f"no {found.score}" for e in evaluations if not math.isfinite(e.score(found.score)))
    if failures:
        text += f" Failed: {', '.join(f'{n:,} ({why})' for why, n in failures.items())}."
    return text
