"""All stages of a pipeline, and the checks that run before the first one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config

from litgpt_whittle.checkpoint import check_checkpoint, read_weights
from litgpt_whittle.data.hf_text import HFText
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.metrics import flops
from litgpt_whittle.pipeline.cache_stage import CacheTeacherStage
from litgpt_whittle.pipeline.correct_teacher import CorrectTeacherStage
from litgpt_whittle.pipeline.distill_stage import DistillStage
from litgpt_whittle.pipeline.extract_stage import ExtractStage
from litgpt_whittle.pipeline.kinds import STAGES
from litgpt_whittle.pipeline.rank_stage import RankStage
from litgpt_whittle.pipeline.search_stage import SearchStage
from litgpt_whittle.pipeline.stage import Given, Request, Stage, StageRun
from litgpt_whittle.processes import n_devices
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import is_tied


class Stages:
    """The stages of a pipeline.

    Args:
        request: Inputs that concern all stages.
        given: The user's sections by name; missing sections have their defaults.

    Raises:
        UserError: If a command does not accept its section.
    """

    correct_teacher: CorrectTeacherStage
    rank: RankStage
    search: SearchStage
    cache_teacher: CacheTeacherStage
    extract: ExtractStage
    distill: DistillStage

    def __init__(self, request: Request, given: Mapping[str, Given]) -> None:
        self.request = request
        teacher_dir = request.existing(request.checkpoint_dir)
        self.teacher = check_checkpoint(teacher_dir)
        self.tied = is_tied(read_weights(teacher_dir))
        self.distill_teacher = check_checkpoint(request.existing(request.teacher_dir))
        self.kinds: list[Stage[Any]] = [kind(self, given.get(kind.name)) for kind in STAGES]
        for kind in self.kinds:
            setattr(self, kind.name, kind)
        for kind in self.kinds:
            kind.read()  # including the sections of stages that are not used

    @property
    def used(self) -> list[Stage[Any]]:
        """The kinds that run."""
        return [kind for kind in self.kinds if kind.is_used]

    def all(self) -> list[StageRun]:
        """Return all runs in order."""
        runs = [run for kind in self.used if not kind.is_per_student for run in kind.runs()]
        for student in self.request.bins:
            runs += [run for kind in self.used if kind.is_per_student for run in kind.runs(student)]
        return runs

    def files(self) -> dict[Path, str]:
        """Return the contents of further files that the stages read, by path."""
        return {path: text for kind in self.used for path, text in kind.files().items()}

    def check(self) -> str:
        """Run the checks of all commands that need no student.

        Returns:
            A description of the memory per device that training the largest student needs, or why it cannot be planned.

        Raises:
            UserError: For the first invalid setting.
        """
        for kind in self.used:
            kind.validate()
        data = {repr(kind.args.data): kind.args.data for kind in self.used}
        for module in data.values():
            if isinstance(module, HFText):
                module.tokenizer_dir = self.request.existing(self.request.checkpoint_dir)
                module.check(reads=True)
        return self.distill.memory

    @property
    def length(self) -> int:
        """Tokens per training sample."""
        return self.distill.args.train.max_seq_length or self.teacher.block_size

    @cached_property
    def teacher_flops(self) -> int:
        """Floating-point operations of a forward pass of the teacher that students are cut from, per token."""
        return flops(self.teacher, SubNet.full(self.teacher), self.length)

    @cached_property
    def distill_teacher_flops(self) -> int:
        """Floating-point operations of a forward pass of the distillation's teacher, per token."""
        return flops(self.distill_teacher, SubNet.full(self.distill_teacher), self.length)

    def student_flops(self, student: str) -> int:
        """Return the floating-point operations of a student's forward pass, per token."""
        return flops(self.teacher, self.search.examples[student], self.length)

    def teacher_bytes(self, dtype: torch.dtype, n_shards: int | str = 1, teacher: Config | None = None) -> int:
        """Return the bytes of a teacher's weights on each device.

        Args:
            dtype: Type of the weights.
            n_shards: Number of devices that share the weights, or "auto".
            teacher: The teacher, by default the one that students are cut from.
        """
        teacher = teacher or self.teacher
        n = n_params(teacher, SubNet.full(teacher), self.tied)
        return n * dtype.itemsize // (1 if n_shards == 1 else n_devices(n_shards))
