"""Run the stages of `litgpt whittle`: commands in sequence, each once and in its own process."""

from __future__ import annotations

import json
import logging
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import lock_dir, to_yaml, write_text
from litgpt_whittle.manifest import changes
from litgpt_whittle.pipeline.stage import StageRun
from litgpt_whittle.watchdog import stop_with_parent

logger = logging.getLogger(__name__)

RECORD = "stages.json"
"""Name of the file with the settings of each stage that has begun, and a mark if it is finished"""

SETTINGS = "whittle.yaml"
"""Name of the file with the pipeline's settings"""

COMMANDS = "commands.sh"
"""Name of the file with the stages as command lines"""


_AGAIN = "run the same command again"
"""Remedy after a stage that was stopped from outside"""


class Pipeline:
    """Runs the stages of a pipeline that are not finished yet.

    Args:
        out_dir: The pipeline's folder.
        settings: The pipeline's settings.

    Raises:
        UserError: If the folder is not empty and not a pipeline's.
    """

    def __init__(self, out_dir: Path, settings: dict[str, Any]) -> None:
        self.out_dir, self.settings = out_dir, settings
        if not (out_dir / SETTINGS).is_file() and out_dir.is_dir() and any(out_dir.iterdir()):
            raise UserError(
                f"out_dir must be empty, new or a pipeline's, got {str(out_dir)!r} without {SETTINGS}; choose another"
            )
        self.record: dict[str, dict[str, Any]] = _read(out_dir / RECORD)

    def check(self, stages: Sequence[StageRun]) -> None:
        """Check that stages that have begun keep their settings; stages that have not begun may change theirs.

        Args:
            stages: All stages in order.

        Raises:
            UserError: If a stage has begun with other settings, or reads the output of a stage that would run again.
        """
        begun = [stage for stage in stages if self._has_begun(stage, stages)]
        for stage in begun:
            was, options = self.record[stage.name]["options"], self._options_of(stage)
            renamed = [{stage.option(name): value for name, value in each.items()} for each in (was, options)]
            changed = changes(*renamed)
            why = f"has begun with other settings: {', '.join(changed)}; change back,"
            if not changed:
                again = [other.name for other in stages if other not in begun and stage.needs(other)]
                if not again:
                    continue
                why = f"was started from the output of {again[0]}, which must run again;"
            left = [stage]
            for later in begun:
                left += [later] if any(map(later.needs, left)) else []
            folders = ", ".join(str(stage.folder) for stage in left)
            raise UserError(f"the stage {stage.name} {why} delete {folders}, or choose another out_dir")

    def _options_of(self, stage: StageRun) -> dict[str, str]:
        # the pipeline's folder may be given by another path
        options = {name: value.removeprefix(f"{self.out_dir}/") for name, value in stage.determining_options.items()}
        return options | {"teacher's weights": str(self.settings.get("teacher"))}

    def _has_begun(self, stage: StageRun, stages: Sequence[StageRun]) -> bool:
        """Return whether a stage is finished or can resume; later stages then depend on its settings."""
        if not self._is_noted_done(stage):
            return stage.name in self.record and stage.kind.can_resume(stage.folder)
        if stage.folder.exists():
            return True
        # a user who deletes an output that every later stage has used does not want it again
        users = [other for other in stages if other.needs(stage)]
        have_used = bool(users) and all(self._is_noted_done(other) and other.folder.exists() for other in users)
        return have_used and self.record[stage.name]["options"] == self._options_of(stage)

    def _is_noted_done(self, stage: StageRun) -> bool:
        return self.record.get(stage.name, {}).get("is_done", False)

    def _note(self, stage: StageRun, is_done: bool) -> None:
        self.record[stage.name] = {"options": self._options_of(stage), "is_done": is_done}
        write_text(self.out_dir / RECORD, json.dumps(self.record, indent=1))

    def run(self, stages: Sequence[StageRun], files: Mapping[Path, str]) -> None:
        """Run the stages that are not finished.

        Args:
            stages: All stages in order.
            files: Contents of further files that the stages read, by path.

        Raises:
            UserError: If a stage fails, which prints its own error, or if another process works in this folder.
        """
        with lock_dir(self.out_dir) as lock_file:
            self.record = _read(self.out_dir / RECORD)  # another process may have finished stages in the meantime
            self._run(stages, files, lock_file)

    def _run(self, stages: Sequence[StageRun], files: Mapping[Path, str], lock_file: IO[Any]) -> None:
        write_text(self.out_dir / SETTINGS, to_yaml(self.settings))
        lines = [f"litgpt {shlex.join(stage.arguments())}" for stage in stages]
        write_text(self.out_dir / COMMANDS, "\n".join([*lines, ""]))
        for stage in stages:
            stage.folder.parent.mkdir(parents=True, exist_ok=True)
            files = {**files, stage.config_path: to_yaml(stage.settings)}
        for path, text in files.items():
            write_text(path, text)
        for i, stage in enumerate(stages, 1):
            title = f"== {i}/{len(stages)} {stage.name}"
            if self._is_noted_done(stage) and self._has_begun(stage, stages):
                logger.info(f"{title}: done already")
                continue
            arguments = stage.arguments(stage.kind.resume_flags(stage.folder))
            self._note(stage, is_done=False)
            logger.info(f"\n{title}\n$ litgpt {shlex.join(arguments)}")
            if code := call([sys.executable, "-m", "litgpt_whittle", *arguments], lock_file):
                # the command's own error would recur; a kill from outside may not
                remedy = "fix the error above and run the command again" if code in (1, 2) else _AGAIN
                raise UserError(f"the stage {stage.name} ended with exit code {code}; {remedy} to resume from there")
            self._note(stage, is_done=True)


def call(command: Sequence[str], lock_file: IO[Any]) -> int:
    """Run a command in this process's terminal, forward SIGTERM to it, and return its exit code.

    Args:
        command: The command line.
        lock_file: The folder's lock, which the command holds open while it runs.

    Raises:
        KeyboardInterrupt: After Ctrl-C, which the terminal sends to the command itself.
        SystemExit: After SIGTERM.
    """
    signals: list[int] = []

    def stop(number: int, frame: Any) -> None:
        signals.append(number)
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process = subprocess.Popen(command, pass_fds=[lock_file.fileno()], preexec_fn=stop_with_parent)
        code = process.wait()  # a stopped command saves first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in signals:
        raise KeyboardInterrupt
    if signals:
        raise SystemExit(128 + signal.SIGTERM)
    return code


def folder_of(target: str) -> str:
    """Return the folder name for a target size: `410M` for `410M±5%`."""
    return re.sub(r"[^\w.-]+", "_", re.split(r"±|\+-|\+/-", target.strip())[0].strip())


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); choose another out_dir") from None
    if any("options" not in stage for stage in record.values()):
        raise UserError(f"{str(path)!r} was written by another version; choose another out_dir")
    return record
