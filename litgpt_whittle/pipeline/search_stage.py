"""The stage that searches the best sub-network of each bin."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_whittle.commands.search import SearchConfig
from litgpt_whittle.fitness.repaired import Repaired
from litgpt_whittle.journal import JOURNAL
from litgpt_whittle.metrics import BACKWARD, MeasureArgs
from litgpt_whittle.pipeline.costs import Cost, n_shards
from litgpt_whittle.pipeline.sections import Section
from litgpt_whittle.pipeline.stage import Stage
from litgpt_whittle.processes import own_device
from litgpt_whittle.repair.costs import (
    candidate_bytes,
    collecting_flops,
    moments_bytes,
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

SELECTION_CONFIG = "selection-distill.yaml"
"""File name of the training config that a selection uses by default"""


class SearchStage(Stage[SearchConfig]):
    """Stage of `litgpt search`, which runs once for all students."""

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
        weights = stages.teacher_bytes(weights_dtype(args.precision or default_precision()), n_shards(args))
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
        """Return the plots of the progress, of the candidates, and of the best architecture of each bin."""
        found = [("The search", folder / "search.png"), ("Size and score", folder / "candidates.png")]
        for path in sorted(folder.glob("architecture*.png")):
            bin = path.stem.removeprefix("architecture").removeprefix("-")
            found.append((f"The best sub-network {bin}".strip(), path))
        return found
