"""Argument groups of `litgpt search`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from litgpt_whittle.errors import UserError
from litgpt_whittle.setting_checks import check_positive


@dataclass
class RacingArgs:
    """Early stopping of candidates with significantly worse losses"""

    start: int = 1
    """Validation batches of the first stage, which scores every candidate"""
    growth: float = 2.0
    """Growth factor of the number of validation batches per stage"""
    alpha: float = 0.05
    """Significance level of the test that compares a candidate with the worst of those to keep, and drops it if it is
    worse"""

    def __post_init__(self) -> None:
        check_positive("racing", start=self.start)
        if not self.growth > 1:
            raise UserError(f"racing.growth must be more than 1, got {self.growth}; 2 doubles the batches per stage")
        if not 0 < self.alpha < 1:
            raise UserError(f"racing.alpha must be between 0 and 1, got {self.alpha}; 0.05 is usual")


@dataclass
class SelectionArgs:
    """Selection among the best candidates of a search by short distillations"""

    rungs: list[str] = field(default_factory=list)
    """Number of students x training tokens of each rung, such as [8x200k, 2x1M]; each rung has fewer students and more
    tokens than the one before. By default nothing is trained, and the candidate with the best score is selected"""
    config: Path | None = None
    """YAML config of litgpt distill for training the students: data, batch sizes, optimizer and losses"""
    repair: bool = True
    """If true, repair students before training"""
