"""The stage that precomputes the teacher's outputs."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from litgpt_whittle.commands.cache_teacher import CacheTeacherConfig
from litgpt_whittle.data.hf_text import HFText
from litgpt_whittle.data.loading import resets_attention
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.cache import INDEX
from litgpt_whittle.errors import UserError
from litgpt_whittle.pipeline.costs import Cost, n_shards
from litgpt_whittle.pipeline.sections import Section
from litgpt_whittle.pipeline.stage import Stage, StageRun
from litgpt_whittle.tensors import default_precision, weights_dtype
from litgpt_whittle.training.checks import check_cache, check_resets

NO_LIMIT = 3_000_000_000_000
"""litgpt's default of train.max_tokens, which means that the user has set no limit"""


class CacheTeacherStage(Stage[CacheTeacherConfig]):
    """Stage of `litgpt cache_teacher`; by default it runs for several students whose losses can learn from a cache."""

    name, config, folder_name = "cache_teacher", CacheTeacherConfig, "teacher_cache"

    @property
    def is_used(self) -> bool:
        """True if the user asks for it, or by default for several students whose losses can learn from it."""
        if self.asked is not None:
            return self.asked is not False
        return self._suits and (len(self.request.bins) > 1 or self.request.shares_cache)

    @cached_property
    def args(self) -> CacheTeacherConfig:
        """The command's config."""
        return self.section.parse(checkpoint_dir=self.request.existing(self.request.teacher_dir))

    def folder(self, student: str = "") -> Path:
        """Return the output folder, which the students of a cascade share if they have the same teacher."""
        return self.request.out_dir / self.folder_name if self.request.shares_cache else super().folder(student)

    def runs(self, student: str = "") -> list[StageRun]:
        """Return the run over the training tokens."""
        return [self.new_run(self.folder(), self.request.teacher_dir)]

    @property
    def _suits(self) -> bool:
        """True if the students' losses can learn from random draws, and the number of tokens to cache is known."""
        distill = self.stages.distill
        args: DistillArgs = distill.args.distill
        is_plain = not args.hidden.is_used and isinstance(args.temperature, int | float) and args.head != "liger"
        if not (args.uses_teacher and distill.has_pipelines_teacher and is_plain and distill.n_tokens < NO_LIMIT):
            return False
        return all(getattr(term.loss, "is_linear", False) for term in args.first_objective.terms)

    @cached_property
    def section(self) -> Section[CacheTeacherConfig]:
        """The section, with the training's batch size, sequence length, temperature and number of tokens."""
        distill = self.stages.distill
        args = distill.args
        seen = {"micro_batch_size": args.train.micro_batch_size, "max_seq_length": args.train.max_seq_length}
        settings: dict[str, Any] = {"devices": self.request.devices, "train": seen}
        if isinstance(args.distill.temperature, int | float):
            settings |= {"temperature": args.distill.temperature}
        if isinstance(args.data, HFText) and distill.n_tokens < NO_LIMIT:
            settings |= {"max_tokens": distill.n_tokens}
        return self.new_section(**settings)

    def validate(self) -> None:
        """Check that the students can learn from the cache."""
        self.section.run_check(self._check_use)

    def _check_use(self) -> None:
        self.args.validate()
        contents, trained, needed = self.args.contents, self.stages.distill, self.stages.distill.n_tokens
        if contents.max_tokens is not None and contents.max_tokens < needed:
            raise UserError(
                f"max_tokens must be at least the {needed:,} tokens that each student is trained on, got "
                f"{contents.max_tokens:,}; raise it or leave it out"
            )
        distill, terms = trained.args.distill, trained.args.distill.first_objective.terms
        if distill.head == "liger":
            raise UserError("distill.head liger cannot learn from a cache; remove --cache_teacher or the head")
        check_cache(contents, "cache to come", terms, distill, self.stages.length, trained.args.teacher_dir)
        check_resets(contents, "cache to come", resets_attention(trained.args.data))

    def costs(self, student: str = "") -> list[Cost]:
        """Return the cost of running the teacher once over the training tokens."""
        n = self.args.max_tokens or self.stages.distill.n_tokens
        dtype, stages = weights_dtype(self.args.precision or default_precision()), self.stages
        weights = stages.teacher_bytes(dtype, n_shards(self.args), stages.distill_teacher)
        return [Cost(self.title(), n, n * stages.distill_teacher_flops, weights=weights)]

    @classmethod
    def can_resume(cls, folder: Path) -> bool:
        """Return whether there is an index."""
        return (folder / INDEX).is_file()
