"""Base class of the stages that run `litgpt distill`."""

from __future__ import annotations

from pathlib import Path

from litgpt_whittle.commands.distill import DistillConfig
from litgpt_whittle.pipeline.stage import Stage
from litgpt_whittle.training.resume import has_training_state

WITHOUT_TEACHER = (
    "--distill.alpha=1",
    "--distill.beta=0",
    "--distill.hidden.weight=0",
    "--distill.hidden.attention=0",
)
"""Flags that turn distillation into plain training"""


class TrainingStage(Stage[DistillConfig]):
    """Stage that runs `litgpt distill`."""

    config, command = DistillConfig, "distill"

    @classmethod
    def can_resume(cls, folder: Path) -> bool:
        """Return whether there is a checkpoint with a training state."""
        return any(map(has_training_state, [*folder.glob("step-*"), folder / "final"]))

    @classmethod
    def resume_flags(cls, folder: Path) -> list[str]:
        """Return the flag to resume if there is a checkpoint."""
        return ["--resume=auto"]

    @classmethod
    def pictures(cls, folder: Path) -> list[tuple[str, Path]]:
        """Return the curves of the training."""
        return [("the training", folder / "training.png")]
