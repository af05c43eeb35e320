"""The stage that fine-tunes the teacher on the training text before anything is cut from it."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from litgpt.utils import instantiate_torch_optimizer

from litgpt_whittle.commands.distill import DistillConfig
from litgpt_whittle.errors import UserError
from litgpt_whittle.metrics import BACKWARD
from litgpt_whittle.pipeline.costs import Cost
from litgpt_whittle.pipeline.sections import Section
from litgpt_whittle.pipeline.stage import Given, StageRun
from litgpt_whittle.pipeline.training_stage import WITHOUT_TEACHER, TrainingStage
from litgpt_whittle.tensors import weights_dtype
from litgpt_whittle.training.checks import read_optimizer
from litgpt_whittle.training.memory_plan import NoPlan

if TYPE_CHECKING:
    from litgpt_whittle.pipeline.stages import Stages

LR_SHARE = 0.2
"""Default learning rate as a share of the distillation's; arXiv 2408.11796 takes a fifth of the pretraining's"""

LIKE_DISTILL = ("data", "train", "eval", "optimizer", "precision", "compile", "logger_name", "activation_checkpointing")
"""Settings that are by default those of the distillation"""

OF_TEACHERS = ("distill", "teacher_")
"""Beginnings of the names of settings that concern a distillation's teacher, which a correction does not have"""


class CorrectTeacherStage(TrainingStage):
    """`litgpt distill` of the teacher itself, without another teacher: "teacher correction" (arXiv 2408.11796)."""

    name, folder_name = "correct_teacher", "corrected_teacher"

    def __init__(self, stages: Stages, given: Given) -> None:
        super().__init__(stages, given)
        self.given = dict(self.given)
        self.max_tokens, self.lr = self.given.pop("max_tokens", None), self.given.pop("lr", None)

    @classmethod
    def checkpoint(cls, out_dir: Path) -> Path:
        """Return the corrected teacher's checkpoint directory in a pipeline's folder."""
        return out_dir / cls.folder_name / "final"

    @property
    def is_used(self) -> bool:
        """True if there is a teacher to correct."""
        return self.request.uncorrected is not None

    def folder(self, student: str = "") -> Path:
        """Return the output folder, which is in the pipeline's folder also in a cascade."""
        return self.request.out_dir / self.folder_name

    def read(self) -> None:
        """Read the section, if there is a teacher to correct."""
        if self.is_used:
            super().read()

    @cached_property
    def section(self) -> Section[DistillConfig]:
        """The section: the distillation's settings, with an own number of tokens and a smaller learning rate.

        Raises:
            UserError: If the number of tokens is missing, or the learning rate is not a positive number.
        """
        if self.max_tokens is None:
            raise UserError("the teacher's correction has no end; set --correct_teacher.max_tokens")
        if unused := [name for name in self.given if name.startswith(OF_TEACHERS)]:
            raise UserError(
                f"correct_teacher.{unused[0]} has no effect, since no other teacher takes part in the correction; "
                "remove it"
            )
        like = self.stages.distill.args.arguments()
        settings = {name: like[name] for name in LIKE_DISTILL if like[name] is not None}
        lr = _lr_of(like["optimizer"])
        settings["optimizer"] = _with_lr(like["optimizer"], self._own_lr(lr))
        length = {"max_tokens": self.max_tokens, "max_steps": None}
        settings["train"] = like["train"] | length | {"min_lr": like["train"]["min_lr"] * self._own_lr(lr) / lr}
        settings["eval"] = like["eval"] | {"initial_validation": True}
        return self.new_section(**settings, devices=self.request.devices)

    def _own_lr(self, lr: float) -> float:
        """Return the learning rate, given the distillation's."""
        try:
            own = LR_SHARE * lr if self.lr is None else float(self.lr)
        except (TypeError, ValueError):
            own = 0.0
        if not 0 < own < float("inf"):
            raise UserError(f"correct_teacher.lr must be a positive number, got {self.lr!r}; 1e-5 is usual")
        return own

    @cached_property
    def args(self) -> DistillConfig:
        """The command's config."""
        args = self.section.parse(initial_checkpoint_dir=self.request.uncorrected)
        return replace(args, distill=replace(args.distill, alpha=1.0, beta=0.0))

    def validate(self) -> None:
        """Run the training's checks, except whether its memory suffices."""
        self.section.run_check(self._check)

    def _check(self) -> None:
        with suppress(NoPlan):  # training itself reports it
            replace(self.args, out_dir=self.request.out_dir).memory_plan()

    def runs(self, student: str = "") -> list[StageRun]:
        """Return the training of the teacher."""
        run = self.new_run(self.folder(), initial_checkpoint_dir=str(self.request.uncorrected))
        return [replace(run, flags=[*run.flags, *WITHOUT_TEACHER])]

    def costs(self, student: str = "") -> list[Cost]:
        """Return the cost of the training."""
        args, stages = self.args, self.stages
        n = args.train.max_tokens or 0
        training = (1 + BACKWARD + args.activation_checkpointing) * n * stages.teacher_flops
        weights = stages.teacher_bytes(weights_dtype(args.used_precision))
        return [Cost(self.title(), n, 0.0, training, weights)]

    @classmethod
    def pictures(cls, folder: Path) -> list[tuple[str, Path]]:
        """Return the curves of the training."""
        return [(f"The teacher's correction: {title}", path) for title, path in super().pictures(folder)]


def _lr_of(optimizer: str | dict[str, Any]) -> float:
    """Return the learning rate of an optimizer's settings, or its default one."""
    settings = copy.deepcopy(read_optimizer(optimizer))  # litgpt changes them
    made = instantiate_torch_optimizer(settings, [torch.nn.Parameter(torch.zeros(2, 2))])
    return float(made.defaults["lr"])


def _with_lr(optimizer: str | dict[str, Any], lr: float) -> dict[str, Any]:
    """Return an optimizer's settings with another learning rate."""
    if isinstance(optimizer, str):
        optimizer = {"class_path": optimizer if "." in optimizer else f"torch.optim.{optimizer}"}
    return {"class_path": optimizer["class_path"], "init_args": {**optimizer.get("init_args", {}), "lr": lr}}
