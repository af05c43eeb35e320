"""A training run's figures: an append-only log, whatever logger was chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from litgpt_whittle.files import write_text


class MetricsLog:
    """JSON lines, one per logged step or validation, each with `iter` and `tokens`.

    Args:
        path: The file.
        resume_at: Iterations that the run has done; 0 starts a new file, else what a killed run logged after that
            iteration is dropped, because it will be logged again.
    """

    def __init__(self, path: Path, resume_at: int = 0) -> None:
        self.path = Path(path)
        kept = [row for row in read_metrics(self.path) if row["iter"] <= resume_at] if resume_at else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        """Appends one line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The log's rows; a last line that a crash cut short is left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
