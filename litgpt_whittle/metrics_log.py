"""Metrics of a training run: an append-only log, independent of the chosen logger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from litgpt_whittle.files import write_text


class MetricsLog:
    """JSON lines, one per logged step or validation, each with `iter` and `tokens`.

    Args:
        path: The file.
        resume_at: Number of finished iterations; 0 starts a new file. Later rows are dropped, because a resumed run
            logs them again.
    """

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        self.path = Path(path)
        kept = [row for row in read_metrics(self.path) if row["iter"] <= resume_at] if resume_at else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the log's rows; skip lines that are not valid JSON, such as a line that a crash has truncated."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
