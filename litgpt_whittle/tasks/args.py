"""Argument groups of tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from litgpt_whittle.errors import UserError
from litgpt_whittle.setting_checks import check_positive

Score = Literal["margin", "accuracy"]


@dataclass
class TaskArgs:
    """Tasks of lm-eval (``pip install 'litgpt-whittle[ecosystem]'``)"""

    names: list[str] = field(default_factory=list)
    """Names of lm-eval's tasks or groups of tasks, YAML files of your own tasks, or folders of such files"""
    limit: int | None = None
    """Maximum number of documents per task or group, a fixed random subset; by default all"""
    skip: int = 0
    """Number of documents to leave out, the first of the same random order: with a search's limit, none of the
    documents that scored its candidates"""

    def __post_init__(self) -> None:
        check_positive("tasks", limit=self.limit)
        if self.skip < 0:
            raise UserError(f"tasks.skip must be 0 or more, got {self.skip}")
        if len(set(self.names)) < len(self.names):
            raise UserError(f"tasks.names must differ, got {self.names}; name each task once")


@dataclass
class SearchTaskArgs(TaskArgs):
    """Tasks of lm-eval for ``--fitness tasks`` and ``--fitness repaired_tasks``"""

    limit: int | None = 200
    """Maximum number of documents per task or group, a fixed random subset; null for all"""
    score: Score = "margin"
    """Mean over tasks to maximise: the accuracy, or the margin. The margin is the log-likelihood of the correct answer
    minus that of the best wrong one, in nats per character. It is positive where the answer is right, and smoother"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("margin", "accuracy"):
            raise UserError(f"tasks.score must be margin or accuracy, got {self.score!r}")
