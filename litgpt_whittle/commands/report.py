"""`litgpt report`: draw the report of a search, finished or running."""

from __future__ import annotations

from pathlib import Path

from litgpt.utils import init_out_dir

from litgpt_whittle.reports.report import PAGE, write_report


def setup(out_dir: Path) -> None:
    """Draw the report of a search, finished or running, from its journal.

    Arguments:
        out_dir: The search's directory. ``report.html`` and its pictures are written there; nothing else is changed.
    """
    out_dir = init_out_dir(out_dir)
    print(write_report(out_dir))
    print(f"The report is {out_dir / PAGE}, its pictures are beside it")
