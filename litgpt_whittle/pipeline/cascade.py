"""Cascades: each distilled student is the teacher that the next, smaller one is cut from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from litgpt.model import GPT

from litgpt_whittle.checkpoint import read_weights, save_checkpoint
from litgpt_whittle.errors import UserError
from litgpt_whittle.pipeline.correct_teacher import CorrectTeacherStage
from litgpt_whittle.pipeline.costs import Cost
from litgpt_whittle.pipeline.estimates import cache_bytes, costs
from litgpt_whittle.pipeline.stage import Given, Request, StageRun
from litgpt_whittle.pipeline.stages import Stages
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.tokenizer_files import copy_tokenizer


@dataclass
class CascadeArgs:
    """Teachers of the students of a cascade"""

    teacher: Literal["first", "nearest"] = "first"
    """Teacher of each distillation: `first`, the pipeline's teacher, or `nearest`, the student that is cut"""


@dataclass(frozen=True)
class Chain:
    """The stages of all students together, or in a cascade those of one student after the other."""

    links: Sequence[Stages]
    """The stages of all students, or of each student"""

    @classmethod
    def of(cls, request: Request, given: Mapping[str, Given], args: CascadeArgs | None, folder: Path) -> Chain:
        """Return the stages.

        Args:
            request: Inputs of the whole pipeline.
            given: The user's sections by name; missing sections have their defaults.
            args: Settings of the cascade; None if all students are cut from the same teacher.
            folder: An empty folder for stand-ins, which must exist as long as the stages are checked.

        Raises:
            UserError: If a command does not accept its section, or the targets do not form a cascade.
        """
        if given.get(CorrectTeacherStage.name) is not None:
            teacher, corrected = request.checkpoint_dir, CorrectTeacherStage.checkpoint(request.out_dir)
            request = replace(request, checkpoint_dir=corrected, uncorrected=teacher, stand_ins={corrected: teacher})
        return cls([Stages(request, given)] if args is None else _cascade(request, given, args, folder))

    def all(self) -> list[StageRun]:
        """Return all runs in order; the students of a cascade may share the first teacher's cache."""
        return [*{run.name: run for link in self.links for run in link.all()}.values()]

    def sources(self) -> dict[str, Path]:
        """Return the checkpoint directories that the students are cut from, by the students' names."""
        return {name: link.request.checkpoint_dir for link in self.links for name in link.request.bins}

    def files(self) -> dict[Path, str]:
        """Return the contents of further files that the stages read, by path."""
        return {path: text for link in self.links for path, text in link.files().items()}

    def check(self) -> str:
        """Run all checks that need no output of a stage.

        Returns:
            A description of the memory per device that training the largest student of each link needs.

        Raises:
            UserError: For the first invalid setting.
        """
        return "\n".join(link.check() for link in self.links)

    def costs(self) -> list[Cost]:
        """Return the cost of each stage."""
        return [*{cost.name: cost for link in self.links for cost in costs(link)}.values()]

    def cache_bytes(self) -> int:
        """Return the maximum size of all caches of teachers; 0 if there is none."""
        sizes = {link.cache_teacher.folder(): cache_bytes(link) for link in self.links if link.cache_teacher.is_used}
        return sum(sizes.values())


def _cascade(request: Request, given: Mapping[str, Given], args: CascadeArgs, folder: Path) -> list[Stages]:
    """Return the stages of each student, in order.

    Students do not exist before their stages have run. Checks and estimates use stand-ins of the same architectures.

    Raises:
        UserError: If the targets do not descend, or a target is out of reach.
    """
    check_descending(request.bins)
    first, chain = request.checkpoint_dir, list[Stages]()
    for name, bin in request.bins.items():
        own = replace(request, bins={name: bin}, shared_dir=request.out_dir / name)
        own = replace(own, shares_cache=args.teacher == "first")
        if chain:
            above = chain[-1]
            (student,) = above.request.bins
            final = above.distill.folder(student) / "final"
            stand_ins = {**above.request.stand_ins, final: save_stand_in(above, folder / student)}
            own = replace(own, checkpoint_dir=final, stand_ins=stand_ins, uncorrected=None)
            own = replace(own, distill_from=first if args.teacher == "first" else None)
        chain.append(Stages(own, given))
        if args.teacher == "nearest":
            _check_teacher(chain[-1])
        _check_hidden(chain[-1])
    return chain


def check_descending(bins: Mapping[str, Bin]) -> None:
    """Check the targets of a cascade.

    Raises:
        UserError: If there is only one, or if one may be as large as the one before.
    """
    if len(bins) < 2:
        raise UserError(f"a cascade needs at least two targets, got {', '.join(bins)}; add one, or remove --cascade")
    for (larger, above), (smaller, below) in pairwise(bins.items()):
        if below.hi >= above.lo:
            raise UserError(
                f"the targets of a cascade must descend, each range below the one before, got {larger} ({above}) "
                f"before {smaller} ({below}); change --target"
            )


def save_stand_in(stages: Stages, folder: Path) -> Path:
    """Save a checkpoint with the architecture of a random sub-network of a student's size, and constant weights.

    The file is small, because each tensor is one number, expanded.

    Args:
        stages: The stages that produce the student.
        folder: The new checkpoint directory.

    Returns:
        The folder.

    Raises:
        UserError: If the target is out of reach.
    """
    (example,) = stages.search.examples.values()
    teacher_dir = stages.request.existing(stages.request.checkpoint_dir)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(example.config).state_dict().items()}
    dtype = read_weights(teacher_dir)["lm_head.weight"].dtype
    weights = {name: torch.zeros(1, dtype=dtype).expand(shape) for name, shape in shapes.items()}
    if not stages.tied:  # a head that equals the embedding would count as tied
        weights["lm_head.weight"] = torch.ones(1, dtype=dtype).expand(shapes["lm_head.weight"])
    save_checkpoint(folder, example.config, weights, tied=stages.tied)
    copy_tokenizer(teacher_dir, folder)
    return folder


def _check_teacher(stages: Stages) -> None:
    """Check that no other teacher is named where each student learns from the one above."""
    if stages.distill.teacher_dir is not None and not stages.distill.has_pipelines_teacher:
        raise UserError(
            "cascade.teacher nearest and distill.teacher_checkpoint_dir name two teachers, got "
            f"{str(stages.distill.teacher_dir)!r}; remove one of the two"
        )


def _check_hidden(stages: Stages) -> None:
    """Check that hidden states are matched only to the teacher that a student is cut from."""
    hidden, distill = stages.distill.args.distill.hidden, stages.distill
    if hidden.is_used and not hidden.projection and not distill.has_own_teacher and distill.has_pipelines_teacher:
        raise UserError(
            "distill.hidden matches a student's channels to those of the teacher that it is cut from, which is not the "
            "first one; set --cascade.teacher nearest, or --distill.hidden.projection true"
        )
