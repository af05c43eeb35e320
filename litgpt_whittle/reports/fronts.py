"""Pareto fronts of a search with several objectives, as files of sub-networks and as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from litgpt.config import Config

from litgpt_whittle.evaluations import (
    bins_of,
    fronts_of,
)
from litgpt_whittle.files import new_folder
from litgpt_whittle.journal import Evaluation
from litgpt_whittle.reports.plots import number
from litgpt_whittle.subnet import SubNet


def save_fronts(
    out_dir: Path,
    evaluations: Sequence[Evaluation],
    objectives: Sequence[str],
    save: Callable[[Evaluation, Path], None],
) -> None:
    """Write a folder for each bin's front, with one sub-network per file; write nothing for a single objective.

    Args:
        out_dir: The search's folder.
        evaluations: All evaluations of the search.
        objectives: The names of the minimised measures.
        save: Writes an evaluation's sub-network to a path.
    """
    fronts = fronts_of(evaluations, objectives) if len(objectives) > 1 else {}
    for bin, front in fronts.items():
        with new_folder(out_dir / folder_name(bin, evaluations)) as folder:
            for evaluation in front:
                save(evaluation, folder / file_name(evaluation))


def front_table(
    teacher: Config, front: Sequence[Evaluation], objectives: Sequence[str], folder: str
) -> list[list[str]]:
    """Return a table of a front, headings first: objectives, sizes, and the sub-network's path in `folder`."""
    lines = [[*objectives, "layers", "channels", "sub-network"]]
    for evaluation in front:
        subnet = SubNet.from_dict(teacher, evaluation.subnet)
        line = [number(evaluation.measure(name), name) for name in objectives]
        line += [f"{len(subnet)}/{teacher.n_layer}", f"{len(subnet.n_embd)}/{teacher.n_embd}"]
        lines.append([*line, f"{folder}/{file_name(evaluation)}"])
    return lines


def folder_name(bin: str, evaluations: Sequence[Evaluation]) -> str:
    """Return the name of a bin's front folder."""
    return "front" if len(bins_of(evaluations)) == 1 else f"front-{bin}"


def file_name(evaluation: Evaluation) -> str:
    """Return the evaluation's file name, which contains its index to be stable while the front changes."""
    return f"{evaluation.index:04d}.yaml"
