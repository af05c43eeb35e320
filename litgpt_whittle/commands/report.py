"""`litgpt report`: draw the report of a search, finished or running."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from litgpt.utils import init_out_dir

from litgpt_whittle.command_config import CommandConfig, as_command
from litgpt_whittle.reports.report import PAGE, write_report
from litgpt_whittle.results import SearchResult


@dataclass
class ReportConfig(CommandConfig):
    """Draw the report of a search, finished or running, from its journal."""

    out_dir: Path
    """The search's directory. ``report.html`` and its pictures are written there; nothing else is changed."""

    def __post_init__(self) -> None:
        self.out_dir = init_out_dir(self.out_dir)

    def validate(self) -> None:
        """Check nothing, because `run` reads the journal first."""

    def run(self) -> SearchResult:
        """Write the report.

        Raises:
            UserError: If there is no journal.
        """
        tables = write_report(self.out_dir)
        where = f"The report is {self.out_dir / PAGE}; its pictures are in the same folder"
        return SearchResult(self.out_dir, summary=f"{tables}\n{where}")


setup = as_command(ReportConfig)
