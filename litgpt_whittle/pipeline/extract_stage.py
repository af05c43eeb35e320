"""The stage that extracts and repairs a student."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from litgpt_whittle.commands.extract import ExtractConfig
from litgpt_whittle.metrics import BACKWARD
from litgpt_whittle.pipeline.costs import Cost
from litgpt_whittle.pipeline.sections import Section
from litgpt_whittle.pipeline.stage import Stage, StageRun
from litgpt_whittle.processes import own_device
from litgpt_whittle.repair.costs import (
    largest_block,
    repair_bytes,
)

REPAIR_PASSES = 3
"""Upper bound of a repair's cost, in forward passes of the teacher over its tokens; see benchmarks/repair.py"""


class ExtractStage(Stage[ExtractConfig]):
    """Stage of `litgpt extract`, with a repair unless the user turns it off."""

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
        """Return the plot of the repair's errors."""
        return [("the repair", folder / "repair.png")]
