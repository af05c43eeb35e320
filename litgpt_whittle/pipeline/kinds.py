"""The kinds of stages, in the order of their runs: correct the teacher, rank, search, cache it, extract, distill."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.checkpoint import has_tokenizer
from litgpt_whittle.commands.cache_teacher import CacheTeacherConfig
from litgpt_whittle.commands.distill import DistillConfig
from litgpt_whittle.commands.extract import ExtractConfig
from litgpt_whittle.commands.rank import RankConfig
from litgpt_whittle.commands.search import SearchConfig
from litgpt_whittle.data.hf_text import HFText
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.cache import INDEX
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness.repaired import Repaired
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.journal import JOURNAL
from litgpt_whittle.metrics import BACKWARD, MeasureArgs
from litgpt_whittle.pipeline.correct_teacher import CorrectTeacherStage
from litgpt_whittle.pipeline.costs import Cost
from litgpt_whittle.pipeline.sections import Section
from litgpt_whittle.pipeline.stage import Stage, StageRun
from litgpt_whittle.pipeline.training_stage import WITHOUT_TEACHER, TrainingStage
from litgpt_whittle.processes import own_device
from litgpt_whittle.ranking.ranking import FILE as IMPORTANCE
from litgpt_whittle.repair.costs import (
    candidate_bytes,
    collecting_flops,
    largest_block,
    moments_bytes,
    repair_bytes,
    solving_flops,
)
from litgpt_whittle.searching.loop import Search
from litgpt_whittle.searching.measuring import measurement_names
from litgpt_whittle.searching.selection import Rung
from litgpt_whittle.spaces.limits import Limits
from litgpt_whittle.spaces.sizes import decided
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.tensors import default_precision, weights_dtype
from litgpt_whittle.training.checks import check_cache
from litgpt_whittle.training.memory_plan import NoPlan
from litgpt_whittle.training.planned_step import teacher_dtype

NO_LIMIT = 3_000_000_000_000
"""litgpt's default of train.max_tokens, which means that the user has set no limit"""

SELECTION_CONFIG = "selection-distill.yaml"
"""File name of the training config that a selection uses by default"""

REPAIR_PASSES = 3
"""Upper bound of a repair's cost, in forward passes of the teacher over its tokens; see benchmarks/repair.py"""


def _n_shards(args: SearchConfig | CacheTeacherConfig | DistillConfig) -> int | str:
    """Return the number of devices that share the teacher's weights, as the user gives it."""
    return args.devices if args.teacher_placement == "sharded" else 1


class RankStage(Stage[RankConfig]):
    """`litgpt rank`, by default for coarse spaces: they keep the first units, which should be the most important."""

    name, config, folder_name, restart_flag = "rank", RankConfig, "rank", "--overwrite=true"

    @property
    def is_used(self) -> bool:
        """True if the user asks for it, or by default if a coarse space has no order yet."""
        if self.asked is not None:
            return self.asked is not False
        settings, args = self.stages.search.plain_section.settings, self.stages.search.plain_args
        given = "importance" in settings or settings.get("order") == "given"
        return args.space.startswith("coarse") and not given

    @property
    def path(self) -> Path:
        """Path of the ranking that the stage writes."""
        return self.folder() / IMPORTANCE

    def costs(self, student: str = "") -> list[Cost]:
        """Return the cost of the gradients, and of the forward passes without each layer."""
        args, whole = self.args, self.stages.teacher_flops
        n_layer_passes = self.stages.teacher.n_layer * args.layer_tokens
        training, tokens = (1 + BACKWARD) * args.tokens * whole, args.tokens + n_layer_passes
        weights = self.stages.teacher_bytes(weights_dtype(args.precision or default_precision()))
        return [Cost(self.title(), tokens, n_layer_passes * whole, training, weights)]

    @classmethod
    def pictures(cls, folder: Path) -> list[tuple[str, Path]]:
        """Return the heat map of the importance."""
        return [("What matters in the teacher", folder / "importance.png")]


class SearchStage(Stage[SearchConfig]):
    """`litgpt search`, once for all students."""

    name, config, folder_name = "search", SearchConfig, "search"

    @cached_property
    def plain_section(self) -> Section[SearchConfig]:
        """The section without the settings that depend on the ranking."""
        section = self.new_section(devices=self.request.devices)
        section.settings["bin"] = [f"{bin.lo}-{bin.hi}" for bin in self.request.bins.values()]
        return section

    @cached_property
    def plain_args(self) -> SearchConfig:
        """The config without the settings that depend on the ranking."""
        return self.plain_section.parse(checkpoint_dir=self.request.existing(self.request.checkpoint_dir))

    @cached_property
    def section(self) -> Section[SearchConfig]:
        """The section, with the ranking and the config of the selection's trainings."""
        section, args = copy.deepcopy(self.plain_section), self.plain_args
        if args.selection.rungs and args.selection.config is None:
            section.flags.append(f"--selection.config={self.selection_config}")
        if not self.stages.rank.is_used:
            return section
        orders = args.space.startswith("coarse") or args.search_space.layers == "best"
        if orders:
            section.settings.setdefault("order", "importance")
        for_starts = args.simple_starts and args.space.startswith("fine")
        if orders or for_starts or args.measure.needs_importance:
            section.settings.setdefault("importance", str(self.stages.rank.path))
        return section

    @property
    def selection_config(self) -> Path:
        """Path of the config of the selection's trainings, unless the user names one."""
        return self.folder().with_name(SELECTION_CONFIG)

    def files(self) -> dict[Path, str]:
        """Return the config of the selection's trainings, unless the user names one."""
        if not self.args.selection.rungs or "config" in self.section.settings.get("selection", {}):
            return {}
        return {self.selection_config: self.stages.distill.section.dump()}

    def validate(self) -> None:
        """Run the search's checks, and draw an example from each bin."""
        to_come = [*self.files(), *([self.stages.rank.path] if self.stages.rank.is_used else [])]
        self.section.run_check(lambda: self.args.validate(to_come))
        _ = self.examples  # raises for bins out of reach

    @cached_property
    def spaces(self) -> dict[str, Space]:
        """The search space of each bin.

        Raises:
            UserError: If the space has no sub-network in a bin.
        """
        args, teacher, tied = self.args, self.stages.teacher, self.stages.tied
        search_space, limits = decided(args.search_space, teacher), Limits()
        if ranges := args.limit.ranges():
            limits = Limits(ranges, teacher, MeasureArgs(args.train.max_seq_length, tied=tied))
        if search_space.layers == "best":  # the best layers are not known yet
            search_space = replace(search_space, layers="any")
        given: dict[str, Any] = {"tied": tied, "args": search_space, "limits": limits}
        make = partial(Space, teacher, args.space, **given)
        return {name: self.section.run_check(partial(make, bin)) for name, bin in self.request.bins.items()}

    @cached_property
    def examples(self) -> dict[str, SubNet]:
        """A random sub-network of each bin.

        Raises:
            UserError: If the space has no sub-network in a bin.
        """
        rng, seed = np.random.default_rng, self.request.seed
        return {name: space.sample(rng(seed)) for name, space in self.spaces.items()}

    @cached_property
    def n_measurements(self) -> int:
        """Number of sub-networks that the strategy measures before the search begins.

        Raises:
            UserError: If the strategy cannot search one of the bins.
        """
        strategy = self.args.made_strategy
        searches = [Search.begin(space, strategy, "score", self.request.seed) for space in self.spaces.values()]
        return len(self.section.run_check(partial(measurement_names, searches)))

    def costs(self, student: str = "") -> list[Cost]:
        """Return the cost of all candidates, measurements and rungs of the selection."""
        args, stages = self.args, self.stages
        whole, parts = stages.teacher_flops, [stages.student_flops(name) for name in self.request.bins]
        n_each = args.eval.max_iters * args.train.micro_batch_size * (args.train.max_seq_length or stages.length)
        if args.task_set is not None:
            n_each = args.task_set.n_input_tokens
        # measured sub-networks are almost as large as the teacher
        tokens = n_each * (args.iterations * len(parts) + self.n_measurements)
        forward: float = n_each * (args.iterations * sum(parts) + self.n_measurements * whole)
        training = 0.0
        for rung in map(Rung.parse, args.selection.rungs):
            tokens += rung.n * rung.tokens * len(parts)
            forward += rung.n * rung.tokens * whole * len(parts)
            training += (1 + BACKWARD) * rung.n * rung.tokens * sum(parts)
        weights = stages.teacher_bytes(weights_dtype(args.precision or default_precision()), _n_shards(args))
        n_calibration, teacher = args.measure.n_calibration, stages.teacher
        tokens += n_calibration
        forward += n_calibration * whole
        if issubclass(args.measure, Repaired):
            solves = sum(solving_flops(subnet, stages.tied) for subnet in self.examples.values())
            solves_measured = self.n_measurements * solving_flops(SubNet.full(teacher), stages.tied)
            forward += collecting_flops(teacher, n_calibration) + args.iterations * solves + solves_measured
            n_distinct, device = min(n_calibration, teacher.vocab_size), own_device()
            weights += moments_bytes(teacher, n_distinct, device) + candidate_bytes(teacher, device)
        return [Cost(self.title(), tokens, forward, training, weights)]

    @classmethod
    def can_resume(cls, folder: Path) -> bool:
        """Return whether there is a journal."""
        return (folder / JOURNAL).is_file()

    @classmethod
    def pictures(cls, folder: Path) -> list[tuple[str, Path]]:
        """Return the progress, the candidates, and the best architecture of each bin."""
        found = [("The search", folder / "search.png"), ("Size and score", folder / "candidates.png")]
        for path in sorted(folder.glob("architecture*.png")):
            bin = path.stem.removeprefix("architecture").removeprefix("-")
            found.append((f"The best sub-network {bin}".strip(), path))
        return found


class CacheTeacherStage(Stage[CacheTeacherConfig]):
    """`litgpt cache_teacher`, by default for several students, if their losses can learn from it."""

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

    def costs(self, student: str = "") -> list[Cost]:
        """Return the cost of running the teacher once over the training tokens."""
        n = self.args.max_tokens or self.stages.distill.n_tokens
        dtype, stages = weights_dtype(self.args.precision or default_precision()), self.stages
        weights = stages.teacher_bytes(dtype, _n_shards(self.args), stages.distill_teacher)
        return [Cost(self.title(), n, n * stages.distill_teacher_flops, weights=weights)]

    @classmethod
    def can_resume(cls, folder: Path) -> bool:
        """Return whether there is an index."""
        return (folder / INDEX).is_file()


class ExtractStage(Stage[ExtractConfig]):
    """`litgpt extract`, with a repair unless the user does not want it."""

    name, config, folder_name, restart_flag = "extract", ExtractConfig, "start", "--overwrite=true"
    is_per_student = True

    @cached_property
    def section(self) -> Section[ExtractConfig]:
        """The section; it uses several devices only for a repair."""
        section = self.new_section(repair=True, devices=self.request.devices)
        if not self._parse(section).repair and "devices" not in self.given:
            section.settings["devices"] = 1
        return section

    @cached_property
    def args(self) -> ExtractConfig:
        """The command's config, with a placeholder for the sub-network that the search has yet to find."""
        return self._parse(self.section)

    def _parse(self, section: Section[ExtractConfig]) -> ExtractConfig:
        teacher_dir = self.request.existing(self.request.checkpoint_dir)
        return section.parse(checkpoint_dir=teacher_dir, sub_network="best.yaml")

    def runs(self, student: str = "") -> list[StageRun]:
        """Return the extraction of a student's sub-network."""
        bins = self.request.bins
        best = self.stages.search.folder() / ("best.yaml" if len(bins) == 1 else f"best-{bins[student]}.yaml")
        return [self.new_run(self.folder(student), self.request.checkpoint_dir, best)]

    def costs(self, student: str = "") -> list[Cost]:
        """Return the cost of the repair."""
        subnet, repair = self.stages.search.examples[student], self.args.repair_args
        name = self.title(student)
        if not self.args.repair:
            return [Cost(name, 0, 0.0, 0.0, largest_block(subnet.teacher))]
        n = repair.n_tokens(subnet.config)
        refining = (1 + BACKWARD) * repair.refine_passes * n * self.stages.student_flops(student)
        weights = repair_bytes(subnet, self.stages.tied, own_device(), repair.refine_passes > 0)
        return [Cost(name, n, REPAIR_PASSES * n * self.stages.teacher_flops, refining, weights)]

    @classmethod
    def pictures(cls, folder: Path) -> list[tuple[str, Path]]:
        """Return the errors of the repair."""
        return [("the repair", folder / "repair.png")]


class DistillStage(TrainingStage):
    """`litgpt distill` of a student, and the training of its baseline."""

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
        alone, beside = size * weights_dtype(args.precision or default_precision()).itemsize, 0
        if runs_teacher:
            dtype = teacher_dtype(args.precision or default_precision())
            beside = stages.teacher_bytes(dtype, _n_shards(args), stages.distill_teacher)
        forward = n * stages.distill_teacher_flops * runs_teacher
        found = [Cost(self.title(student), n, forward, training, alone + beside)]
        return found + [Cost(f"{student}/baseline", n, 0.0, training, alone)] * self.request.has_baseline


STAGES: Sequence[type[Stage]] = (
    CorrectTeacherStage,
    RankStage,
    SearchStage,
    CacheTeacherStage,
    ExtractStage,
    DistillStage,
)
"""All kinds of stages in the order of their runs; kinds that run once per student come last"""

STAGE_OF: dict[str, type[Stage]] = {kind.name: kind for kind in STAGES}
"""Kinds by the names of their commands and sections"""
