"""Report of a pipeline: a table, a plot of the trainings, and one page with the stages' pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from litgpt_whittle.figures.style import (
    BLACK,
    COLORS,
    GRAY,
    new_figure,
    save_figure,
)
from litgpt_whittle.files import write_text
from litgpt_whittle.pipeline.correct_teacher import CorrectTeacherStage
from litgpt_whittle.pipeline.kinds import STAGES
from litgpt_whittle.pipeline.run import COMMANDS
from litgpt_whittle.reports.page import Section, code, page, picture, table
from litgpt_whittle.reports.plots import score_axis
from litgpt_whittle.results import Checkpoint, TrainingResult, searched_perplexity, tokens_to_reach

_ABOUT = """
Perplexities on validation text. 'As searched' was measured by the search on its own number of tokens. The others were
measured by the training: before its first step, after its last step, and after training the same architecture from
random weights without the teacher. Calibration tokens of the repair are counted.
"""

_ABOUT_CASCADE = """
Each student is cut from the one above it. Its tokens do not include those of the students above.
"""

_ABOUT_TASKS = """
Accuracies in percent with their standard errors, and the share of the teacher's accuracy in brackets: acc_norm where a
task has it, else acc, as measured by lm-eval. 'Plain cut' is before the repair.
"""

PAGE, CURVES = "report.html", "students.png"


@dataclass(frozen=True)
class StudentResult:
    """The checkpoints and trainings of one student."""

    name: str
    start: Checkpoint
    distilled: TrainingResult
    baseline: TrainingResult | None
    cut_from: str = ""
    """In a cascade, the name of the teacher that the student is cut from"""

    @classmethod
    def read(cls, folder: Path, cut_from: str = "") -> StudentResult:
        """Read a student's folder."""
        baseline = TrainingResult(folder / "baseline")
        distilled = TrainingResult(folder / "distilled")
        start = Checkpoint(folder / "start")
        return cls(folder.name, start, distilled, baseline if baseline.is_finished else None, cut_from)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(token count, validation loss) pairs; counts include the repair's calibration tokens, losses are in nats."""
        return [(self.start.calibration_tokens + tokens, loss) for tokens, loss in self.distilled.curve]

    def row(self, n_teacher: int) -> list[str]:
        """Return the student's row of the table."""
        searched = searched_perplexity(self.start.origin)
        n_params = self.distilled.checkpoint.n_params
        cells = [self.name, self.cut_from, f"{n_params:,}", f"{n_params / n_teacher:.0%}"]
        cells.append("" if searched is None else f"{searched:.2f}")
        cells += [f"{math.exp(self.curve[0][1]):.2f}", f"{self.distilled.perplexity:.2f}", f"{self.curve[-1][0]:,}"]
        if self.baseline is None:
            return [*cells, "", ""]
        reached = tokens_to_reach(self.curve, min(loss for _, loss in self.baseline.curve))
        return [*cells, f"{self.baseline.perplexity:.2f}", "never" if reached is None else f"{reached:,}"]


def write_outcome(
    out_dir: Path,
    names: Sequence[str],
    teacher: Checkpoint,
    tasks: Sequence[Sequence[str]] = (),
    is_cascade: bool = False,
) -> list[list[str]]:
    """Write the page and the plot of the trainings.

    Args:
        out_dir: The pipeline's folder.
        names: Names of its students.
        teacher: The teacher's checkpoint, before a correction.
        tasks: Table of the models' accuracies on tasks, headings first; empty if none were measured.
        is_cascade: True if each student is cut from the one before.

    Returns:
        The table, headings first.
    """
    above = ["teacher", *names] if is_cascade else [""] * len(names)
    outcomes = [StudentResult.read(out_dir / name, cut_from) for name, cut_from in zip(names, above)]
    n_teacher = teacher.n_params
    rows = [["", "cut from", "parameters", "of the teacher", "as searched", "at the start", "distilled", "tokens"]]
    rows[0] += ["random weights", "tokens to reach that"]
    taught = next((o.distilled.teacher_val_loss for o in outcomes if o.distilled.teacher_val_loss is not None), None)
    rows += _teacher_rows(n_teacher, taught, TrainingResult(out_dir / CorrectTeacherStage.folder_name))
    rows += [outcome.row(n_teacher) for outcome in outcomes]
    empty = [i for i in range(len(rows[0])) if i and not any(row[i] for row in rows[1:])]
    rows = [[cell for i, cell in enumerate(row) if i not in empty] for row in rows]
    plot_students(outcomes, taught, out_dir / CURVES)
    about = _ABOUT + _ABOUT_CASCADE if is_cascade else _ABOUT
    sections = [Section("The students", about, table(rows) + picture(out_dir / CURVES, "The trainings"))]
    sections += [Section("Tasks", _ABOUT_TASKS, table(tasks))] if tasks else []
    sections += [
        Section(title, "", picture(path, title)) for title, path in _pictures(out_dir, names) if path.is_file()
    ]
    commands = out_dir / COMMANDS
    sections.append(
        Section(
            "Commands", "The stages as command lines, which can also be run one by one.", code(commands.read_text())
        )
    )
    write_text(out_dir / PAGE, page(f"Students of {teacher.config.name}", sections))
    return rows


def _teacher_rows(n_teacher: int, val_loss: float | None, corrected: TrainingResult) -> list[list[str]]:
    """Return the teacher's row of the table, and a second one if it was corrected."""
    row = ["teacher", "", f"{n_teacher:,}", "100%", "", "", "" if val_loss is None else f"{math.exp(val_loss):.2f}"]
    row += ["", "", ""]
    if not corrected.is_finished:
        return [row]
    before = f"{math.exp(corrected.curve[0][1]):.2f}"
    after = [before, f"{corrected.perplexity:.2f}", f"{corrected.curve[-1][0]:,}"]
    return [[*row[:6], before, *row[7:]], ["corrected teacher", *row[1:5], *after, *row[8:]]]


def _pictures(out_dir: Path, names: Sequence[str]) -> list[tuple[str, Path]]:
    found = [each for kind in STAGES if not kind.is_per_student for each in kind.pictures(out_dir / kind.folder_name)]
    for name in names:  # in a cascade, all stages are in the students' folders
        own = [kind.pictures(out_dir / name / kind.folder_name) for kind in STAGES]
        found += [(f"{name}: {title[0].lower()}{title[1:]}", path) for pictures in own for title, path in pictures]
    return found


def plot_students(outcomes: Sequence[StudentResult], teacher_val_loss: float | None, path: Path) -> None:
    """Plot validation perplexity over tokens, for every student and its baseline."""
    from matplotlib.ticker import EngFormatter

    figure, [[axes]] = new_figure()
    for i, outcome in enumerate(outcomes):
        color = COLORS[i % len(COLORS)]
        _draw(axes, outcome.curve, f"{outcome.name}, {math.exp(outcome.curve[-1][1]):.2f}", color, "-")
        if outcome.baseline is not None:
            curve = outcome.baseline.curve
            label = f"{outcome.name} from random weights, {math.exp(curve[-1][1]):.2f}"
            _draw(axes, curve, label, GRAY if len(outcomes) == 1 else color, ":")
    if teacher_val_loss is not None:
        value = math.exp(teacher_val_loss)
        axes.axhline(value, color=BLACK, linestyle="--", linewidth=1, label=f"teacher, {value:.2f}")
    curves = [o.curve for o in outcomes] + [o.baseline.curve for o in outcomes if o.baseline is not None]
    score_axis(axes.yaxis, [math.exp(loss) for curve in curves for _, loss in curve], "validation perplexity")
    axes.set_xlabel("tokens of calibration and training")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title("The students' trainings", loc="left")
    save_figure(figure, path)


def _draw(axes, curve: Sequence[tuple[int, float]], label: str, color: str, style: str) -> None:
    tokens, losses = zip(*curve)
    axes.plot(tokens, [math.exp(loss) for loss in losses], "o" + style, ms=3, color=color, label=label)
