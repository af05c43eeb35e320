"""The settings that `litgpt whittle` gives each command, and the checks that run before the first stage."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from litgpt.data import DataModule

from litgpt_whittle.checkpoint import check_checkpoint, has_tokenizer, read_weights
from litgpt_whittle.command_config import CommandConfig
from litgpt_whittle.commands.cache_teacher import CacheTeacherConfig
from litgpt_whittle.commands.distill import DistillConfig
from litgpt_whittle.commands.extract import ExtractConfig
from litgpt_whittle.commands.rank import RankConfig
from litgpt_whittle.commands.search import SearchConfig
from litgpt_whittle.data.hf_text import HFText
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.errors import UserError
from litgpt_whittle.metrics import MeasureArgs
from litgpt_whittle.pipeline.run import Stage
from litgpt_whittle.pipeline.sections import Section, merge
from litgpt_whittle.ranking.ranking import FILE as IMPORTANCE
from litgpt_whittle.searching.loop import Search
from litgpt_whittle.searching.measuring import measurement_names
from litgpt_whittle.settings import describe
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.limits import Limits
from litgpt_whittle.spaces.sizes import decided
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import is_tied
from litgpt_whittle.training.checks import check_cache
from litgpt_whittle.training.memory_plan import NoPlan

COMMANDS: dict[str, type[CommandConfig]] = {
    "rank": RankConfig,
    "search": SearchConfig,
    "extract": ExtractConfig,
    "cache_teacher": CacheTeacherConfig,
    "distill": DistillConfig,
}
"""Config classes of a pipeline's commands, by the names of their sections"""

BASELINE = [
    "--random_weights=true",
    "--distill.alpha=1",
    "--distill.beta=0",
    "--distill.hidden.weight=0",
    "--distill.hidden.attention=0",
]
"""Flags that turn distillation into plain pretraining from random weights"""

NO_LIMIT = 3_000_000_000_000
"""litgpt's default number of training tokens"""

SELECTION_CONFIG = "selection-distill.yaml"
"""Name of the training config for a selection's students, unless the search's settings name one"""

PROVIDED = (
    *("checkpoint_dir", "out_dir", "bin", "resume", "overwrite", "dry_run", "sub_network", "random_weights"),
    *("initial_checkpoint_dir", "model_name", "model_config", "teacher_cache"),
)
"""Arguments of the commands that the pipeline itself provides"""


@dataclass(frozen=True)
class Request:
    """Inputs of a pipeline that concern all stages."""

    checkpoint_dir: Path
    bins: dict[str, Bin]
    """Bins by the names of the students' folders"""
    out_dir: Path
    data: DataModule | None
    devices: int | str
    seed: int
    has_baseline: bool


class Stages:
    """The commands of a pipeline.

    Args:
        request: Inputs that concern all stages.
        rank: The section of `litgpt rank`, or true or false to rank or not; None to rank for coarse spaces.
        search: The section of `litgpt search`.
        extract: The section of `litgpt extract`.
        cache: The section of `litgpt cache_teacher`, or true or false to cache or not; None to cache for several
            students, if their losses allow it.
        distill: The section of `litgpt distill`.

    Raises:
        UserError: If a command does not accept its section.
    """

    def __init__(
        self,
        request: Request,
        rank: bool | dict[str, Any] | None,
        search: dict[str, Any],
        extract: dict[str, Any],
        cache: bool | dict[str, Any] | None,
        distill: dict[str, Any],
    ) -> None:
        self.request = request
        self.teacher = check_checkpoint(request.checkpoint_dir)
        self.tied = is_tied(read_weights(request.checkpoint_dir))
        self.distill = self._distill_section(distill)
        self.trained = self.distill.parse()
        self._check_trained()
        self.search, self.searched = self._search_section(search)
        self.ranks = self._needs_ranking() if rank is None else rank is not False
        self.rank = self._section("rank", rank if isinstance(rank, dict) else {})
        self.ranked = self.rank.parse(checkpoint_dir=request.checkpoint_dir)
        if self.ranks:
            self._search_by_importance()
        self.extract, self.extracted = self._extract_section(extract)
        self.caches = self._can_cache() and len(request.bins) > 1 if cache is None else cache is not False
        self.cache = self._cache_section(cache if isinstance(cache, dict) else {})
        self.cached = self.cache.parse(checkpoint_dir=request.checkpoint_dir)

    def all(self) -> list[Stage]:
        """Return all stages in order."""
        teacher, out_dir = self.request.checkpoint_dir, self.request.out_dir
        stages = [self._stage(self.rank, out_dir / "rank", teacher)] if self.ranks else []
        stages.append(self._stage(self.search, out_dir / "search", teacher))
        if self.caches:
            stages.append(self._stage(self.cache, out_dir / "teacher_cache", teacher))
        for name, bin in self.request.bins.items():
            folder = out_dir / name
            best = out_dir / "search" / ("best.yaml" if len(self.request.bins) == 1 else f"best-{bin}.yaml")
            stages.append(self._stage(self.extract, folder / "start", teacher, best))
            more = {"initial_checkpoint_dir": str(folder / "start")}
            source = {"teacher_cache": str(out_dir / "teacher_cache")} if self.caches else {}
            stages.append(self._stage(self.distill, folder / "distilled", **more, **source))
            if self.request.has_baseline:
                alone = self._stage(self.distill, folder / "baseline", **more)
                stages.append(replace(alone, flags=[*alone.flags, *BASELINE]))
        return stages

    def files(self) -> dict[Path, str]:
        """Return the contents of further files that the stages read, by path."""
        if not self.searched.selection.rungs or "config" in self.search.settings.get("selection", {}):
            return {}
        return {self.request.out_dir / SELECTION_CONFIG: self.distill.dump()}

    @cached_property
    def spaces(self) -> dict[str, Space]:
        """The search space of each bin.

        Raises:
            UserError: If the space has no sub-network in a bin.
        """
        args, tied = self.searched, self.tied
        search_space, limits = decided(args.search_space, self.teacher), Limits()
        if ranges := args.limit.ranges():
            limits = Limits(ranges, self.teacher, MeasureArgs(args.train.max_seq_length, tied=tied))
        if search_space.layers == "best":  # the best layers are not known yet
            search_space = replace(search_space, layers="any")
        given: dict[str, Any] = {"tied": tied, "args": search_space, "limits": limits}
        make = partial(Space, self.teacher, args.space, **given)
        return {name: self.search.run_check(partial(make, bin)) for name, bin in self.request.bins.items()}

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
        strategy = self.searched.made_strategy
        searches = [Search.begin(space, strategy, "score", self.request.seed) for space in self.spaces.values()]
        return len(self.search.run_check(partial(measurement_names, searches)))

    def check(self) -> str:
        """Run the checks of all commands that need no student.

        Returns:
            A text on the memory per device for training the largest student, if it can be estimated.

        Raises:
            UserError: For the first invalid setting.
        """
        if self.ranks:
            self.rank.run_check(self.ranked.validate)
        to_come = [self.request.out_dir / "rank" / IMPORTANCE, *self.files()]
        self.search.run_check(lambda: self.searched.validate(to_come if self.ranks else to_come[1:]))
        largest = max(self.examples, key=lambda name: self.request.bins[name].hi)  # raises for bins out of reach
        self.extract.run_check(self.extracted.validate)
        if self.caches:
            self.cache.run_check(self._check_cache)
        plan = self.distill.run_check(lambda: self._plan_training(largest))
        for data in self._data():
            data.check(reads=True)
        return plan

    def _data(self) -> list[HFText]:
        """Return the different text data modules of all stages."""
        args = [*[self.ranked] * self.ranks, self.searched, self.extracted, *[self.cached] * self.caches, self.trained]
        found = {repr(each.data): each.data for each in args}
        return [data for data in found.values() if isinstance(data, HFText)]

    def _check_cache(self) -> None:
        self.cached.validate()
        contents, needed = self.cached.contents, self.n_tokens
        if contents.max_tokens is not None and contents.max_tokens < needed:
            raise UserError(
                f"max_tokens must be at least the {needed:,} that each student is trained on, got "
                f"{contents.max_tokens:,}; raise it or leave it out"
            )
        distill, teacher = self.trained.distill, self.trained.teacher_dir
        check_cache(contents, "cache to come", distill.objectives()(0.0).terms, distill, self.length, teacher)

    def _plan_training(self, name: str) -> str:
        """Run the distillation's checks for one of the students, except those of the cache; return the memory plan."""
        changes: dict[str, Any] = {"train": replace(self.trained.train, tie_embeddings=self.tied)}
        if self.caches:  # the cache does not exist yet
            changes["distill"] = DistillArgs(beta=0.0)
        if has_tokenizer(self.request.checkpoint_dir):  # students inherit their teacher's tokenizer
            changes["tokenizer_dir"] = self.trained.tokenizer_dir or self.request.checkpoint_dir
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sub_network.yaml"
            self.examples[name].save(path)
            # another teacher's student was not cut from it
            changes |= {"sub_network": path} if self._own_teacher else {"model_config": self.examples[name].config}
            try:
                plan = replace(self.trained, out_dir=self.request.out_dir, **changes).memory_plan()
            except NoPlan as error:
                return f"Training {name}: {error}"
        return f"Training {name}, as a random sub-network of its size. {plan}"

    def _stage(self, section: Section, folder: Path, *inputs: Path, **more: Any) -> Stage:
        return Stage(section.name, folder, merge(section.settings, more), section.flags, inputs)

    def _section(self, name: str, given: Mapping[str, Any], **defaults: Any) -> Section:
        for argument, value in given.items():
            if argument.partition(".")[0] in PROVIDED and value not in (None, False):
                raise UserError(f"{name}.{argument} is set by the pipeline; remove it")
        common = {"seed": self.request.seed} | ({"data": describe(self.request.data)} if self.request.data else {})
        return Section(name, COMMANDS[name], given, common | defaults)

    def _distill_section(self, given: Mapping[str, Any]) -> Section:
        teacher = {"teacher_checkpoint_dir": str(self.request.checkpoint_dir), "devices": self.request.devices}
        return self._section("distill", given, **teacher, eval={"initial_validation": True})

    def _check_trained(self) -> None:
        args, section = self.trained, self.distill
        # litgpt's default would be trillions of tokens
        given = [*section.settings.get("train", {}), *(flag.partition("=")[0] for flag in section.flags)]
        names = {name.removeprefix("--train.") for name in given}
        if not any(name in names and getattr(args.train, name) for name in ("max_tokens", "max_steps")):
            raise UserError("the distillation must end somewhere; set --distill.train.max_tokens")
        if args.train.tie_embeddings not in (None, self.tied):
            asked, needed = (str(value).lower() for value in (args.train.tie_embeddings, self.tied))
            raise UserError(
                f"distill.train.tie_embeddings must be {needed}, as the teacher's LM head is, got {asked}, which would "
                "change the sizes that are searched for; leave it out"
            )
        if args.repair:
            raise UserError("distill.repair is the stage before it; set extract.repair instead")

    def _extract_section(self, given: Mapping[str, Any]) -> tuple[Section, ExtractConfig]:
        inputs = {"checkpoint_dir": self.request.checkpoint_dir, "sub_network": "best.yaml"}
        section = self._section("extract", given, repair=True, devices=self.request.devices)
        args = section.parse(**inputs)
        if not args.repair and "devices" not in given:  # only a repair is shared by devices
            section.settings["devices"] = 1
            args = section.parse(**inputs)
        return section, args

    def _search_section(self, given: Mapping[str, Any]) -> tuple[Section, SearchConfig]:
        bins = [f"{bin.lo}-{bin.hi}" for bin in self.request.bins.values()]
        section = self._section("search", given, devices=self.request.devices)
        section.settings["bin"] = bins
        args = section.parse(checkpoint_dir=self.request.checkpoint_dir)
        if args.selection.rungs and args.selection.config is None:
            section.flags.append(f"--selection.config={self.request.out_dir / SELECTION_CONFIG}")
            args = section.parse(checkpoint_dir=self.request.checkpoint_dir)
        return section, args

    def _needs_ranking(self) -> bool:
        """Return whether to rank by default: coarse spaces keep the first units, which should be the most important."""
        settings = self.search.settings
        given = "importance" in settings or settings.get("order") == "given"
        return self.searched.space.startswith("coarse") and not given

    def _search_by_importance(self) -> None:
        settings, args = self.search.settings, self.searched
        orders = args.space.startswith("coarse") or args.search_space.layers == "best"
        if orders:
            settings.setdefault("order", "importance")
        for_starts = args.simple_starts and args.space.startswith("fine")
        if orders or for_starts or args.measure.needs_importance:
            settings.setdefault("importance", str(self.request.out_dir / "rank" / IMPORTANCE))
        self.searched = self.search.parse(checkpoint_dir=self.request.checkpoint_dir)

    @property
    def length(self) -> int:
        """Tokens per training sample."""
        return self.trained.train.max_seq_length or self.teacher.block_size

    @property
    def n_tokens(self) -> int:
        """Training tokens per student."""
        train = self.trained.train
        limits = [train.max_tokens] if train.max_tokens else []
        if train.max_steps:
            limits.append(train.max_steps * train.global_batch_size * self.length)
        return min(limits)

    @property
    def _own_teacher(self) -> bool:
        """True if students are distilled from the teacher that they are cut from."""
        return self.trained.teacher_dir == self.request.checkpoint_dir

    def _can_cache(self) -> bool:
        """Return whether a cache of random draws suffices for the students' losses, and has a known end."""
        args: DistillArgs = self.trained.distill
        is_plain = not args.hidden.is_used and isinstance(args.temperature, int | float)
        if not (args.uses_teacher and self._own_teacher and is_plain and self.n_tokens < NO_LIMIT):
            return False
        return all(getattr(term.loss, "is_linear", False) for term in args.objectives()(0.0).terms)

    def _cache_section(self, given: Mapping[str, Any]) -> Section:
        args = self.trained
        seen = {"micro_batch_size": args.train.micro_batch_size, "max_seq_length": args.train.max_seq_length}
        settings: dict[str, Any] = {"devices": self.request.devices, "train": seen}
        if isinstance(args.distill.temperature, int | float):
            settings |= {"temperature": args.distill.temperature}
        if isinstance(args.data, HFText) and self.n_tokens < NO_LIMIT:
            settings |= {"max_tokens": self.n_tokens}
        return self._section("cache_teacher", given, **settings)
