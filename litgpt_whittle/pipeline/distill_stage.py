"""The stage that distills a student, and trains its baseline."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.checkpoint import has_tokenizer
from litgpt_whittle.commands.distill import DistillConfig
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.metrics import BACKWARD
from litgpt_whittle.pipeline.costs import Cost, n_shards
from litgpt_whittle.pipeline.sections import Section
from litgpt_whittle.pipeline.stage import StageRun
from litgpt_whittle.pipeline.training_stage import WITHOUT_TEACHER, TrainingStage
from litgpt_whittle.tensors import weights_dtype
from litgpt_whittle.training.memory_plan import NoPlan
from litgpt_whittle.training.planned_step import teacher_dtype


class DistillStage(TrainingStage):
    """Stage of `litgpt distill`, which trains a student, and its baseline if asked for."""

    name, folder_name, is_per_student = "distill", "distilled", True
    memory = ""
    """Description of the memory per device that training the largest student needs; set by `validate`"""

    @cached_property
    def section(self) -> Section[DistillConfig]:
        """The section, with the teacher."""
        teacher = {"teacher_checkpoint_dir": str(self.request.teacher_dir), "devices": self.request.devices}
        return self.new_section(**teacher, eval={"initial_validation": True})

    @cached_property
    def args(self) -> DistillConfig:
        """The command's config.

        Raises:
            UserError: If the command does not accept the section, or the training contradicts the pipeline.
        """
        section, tied = self.section, self.stages.tied
        existing = (
            {} if self.teacher_dir is None else {"teacher_checkpoint_dir": self.request.existing(self.teacher_dir)}
        )
        args = section.parse(**existing)
        # litgpt's default would be trillions of tokens
        given = [*section.settings.get("train", {}), *(flag.partition("=")[0] for flag in section.flags)]
        names = {name.removeprefix("--train.") for name in given}
        if not any(name in names and getattr(args.train, name) for name in ("max_tokens", "max_steps")):
            raise UserError("the distillation has no end; set --distill.train.max_tokens")
        if args.train.tie_embeddings not in (None, tied):
            asked, needed = (str(value).lower() for value in (args.train.tie_embeddings, tied))
            raise UserError(
                f"distill.train.tie_embeddings must be {needed}, like the teacher's, got {asked}, which would change "
                "the parameter counts of the search; leave it out"
            )
        if args.repair:
            raise UserError(
                "distill.repair cannot be set, the extract stage repairs the student; set extract.repair instead"
            )
        return args

    @property
    def n_tokens(self) -> int:
        """Training tokens per student."""
        train = self.args.train
        limits = [train.max_tokens] if train.max_tokens else []
        if train.max_steps:
            limits.append(train.max_steps * train.global_batch_size * self.stages.length)
        return min(limits)

    @property
    def teacher_dir(self) -> Path | None:
        """The teacher's checkpoint directory; an earlier stage may have yet to write it."""
        named = self.section.settings["teacher_checkpoint_dir"]
        return None if named is None else extend_checkpoint_dir(Path(named))

    @property
    def has_pipelines_teacher(self) -> bool:
        """True if the user sets no other teacher."""
        return self.teacher_dir == self.request.teacher_dir

    @property
    def has_own_teacher(self) -> bool:
        """True if students are distilled from the teacher that they are cut from."""
        return self.teacher_dir == self.request.checkpoint_dir

    def validate(self) -> None:
        """Run the distillation's checks for the largest student, except the cache's checks, and plan its memory."""
        largest = max(self.stages.search.examples, key=lambda name: self.request.bins[name].hi)
        self.memory = self.section.run_check(lambda: self._plan_memory(largest))

    def _plan_memory(self, student: str) -> str:
        subnet = self.stages.search.examples[student]
        changes: dict[str, Any] = {"train": replace(self.args.train, tie_embeddings=self.stages.tied)}
        if self.stages.cache_teacher.is_used:  # the cache does not exist yet
            changes["distill"] = DistillArgs(beta=0.0)
        teacher_dir = self.request.existing(self.request.checkpoint_dir)
        if has_tokenizer(teacher_dir):  # students inherit their teacher's tokenizer
            changes["tokenizer_dir"] = self.args.tokenizer_dir or teacher_dir
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sub_network.yaml"
            subnet.save(path)
            # if another teacher trains the student, it is not a sub-network of that teacher
            changes |= {"sub_network": path} if self.has_own_teacher else {"model_config": subnet.config}
            try:
                plan = replace(self.args, out_dir=self.request.out_dir, **changes).memory_plan()
            except NoPlan as error:
                return f"Training {student}: {error}"
        return f"Training {student}, as a random sub-network of its size. {plan}"

    def runs(self, student: str = "") -> list[StageRun]:
        """Return the distillation of a student, and the training of its baseline if asked for."""
        start = {"initial_checkpoint_dir": str(self.stages.extract.folder(student))}
        cache = self.stages.cache_teacher
        source = {"teacher_cache": str(cache.folder())} if cache.is_used else {}
        found = [self.new_run(self.folder(student), **start, **source)]
        if self.request.has_baseline:
            alone = self.new_run(self.folder(student).with_name("baseline"), **start)
            found.append(replace(alone, flags=[*alone.flags, "--random_weights=true", *WITHOUT_TEACHER]))
        return found

    def costs(self, student: str = "") -> list[Cost]:
        """Return the cost of the training, teacher included, and of the baseline if there is one."""
        stages, args, n = self.stages, self.args, self.n_tokens
        runs_teacher = args.distill.uses_teacher and not stages.cache_teacher.is_used
        # activation checkpointing runs each block forward twice
        training = (1 + BACKWARD + args.activation_checkpointing) * n * stages.student_flops(student)
        size = n_params(stages.teacher, stages.search.examples[student], stages.tied)
        alone, beside = size * weights_dtype(args.used_precision).itemsize, 0
        if runs_teacher:
            dtype = teacher_dtype(args.used_precision)
            beside = stages.teacher_bytes(dtype, n_shards(args), stages.distill_teacher)
        forward = n * stages.distill_teacher_flops * runs_teacher
        found = [Cost(self.title(student), n, forward, training, alone + beside)]
        return found + [Cost(f"{student}/baseline", n, 0.0, training, alone)] * self.request.has_baseline
