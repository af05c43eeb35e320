"""Show the package's log messages on the terminal of a command.

A command prints its result to standard output. Notes, progress and status are logged by `logging` at level INFO, so
that the Python API shows them only if its user configures logging.
"""

from __future__ import annotations

import logging
import sys


class StandardErrorHandler(logging.Handler):
    """Writes the messages of rank 0 to standard error, above any progress bar and after all output printed so far."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        from litgpt_whittle.processes import is_first_started, rank

        if is_first_started() and rank() == 0:
            sys.stdout.flush()
            tqdm.write(self.format(record), file=sys.stderr)


def show_log() -> None:
    """Show the package's log messages on standard error; does nothing if they are already shown."""
    logger = logging.getLogger("litgpt_whittle")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, StandardErrorHandler) for handler in logger.handlers):
        logger.addHandler(StandardErrorHandler())
