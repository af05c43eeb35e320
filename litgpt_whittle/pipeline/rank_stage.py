"""The stage that ranks the units of the teacher."""

from __future__ import annotations

from pathlib import Path

from litgpt_whittle.commands.rank import RankConfig
from litgpt_whittle.metrics import BACKWARD
from litgpt_whittle.pipeline.costs import Cost
from litgpt_whittle.pipeline.stage import Stage
from litgpt_whittle.ranking.ranking import FILE as IMPORTANCE
from litgpt_whittle.tensors import default_precision, weights_dtype


class RankStage(Stage[RankConfig]):
    """Stage of `litgpt rank`.

    By default, it runs for coarse spaces, which keep the first units: the ranking puts the most important ones first.
    """

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
