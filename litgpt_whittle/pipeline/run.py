"""The stages of `litgpt whittle`: commands that run one after the other, each in a process of its own, each once."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt_whittle.distillation.cache import INDEX
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import to_yaml, write_text
from litgpt_whittle.searching.journal import JOURNAL
from litgpt_whittle.training.resume import check_settings, flatten

DONE = "done.json"
"""The stages that are finished"""

SETTINGS = "whittle.yaml"
"""What the pipeline was asked for"""

COMMANDS = "commands.sh"
"""The stages as command lines"""


@dataclass(frozen=True)
class Stage:
    """One command, with what its YAML and its command line say."""

    command: str
    folder: Path
    """Its out_dir"""
    settings: dict[str, Any] = field(default_factory=dict)
    """What its YAML holds"""
    flags: Sequence[str] = ()
    """What the pipeline's command line said for it"""
    inputs: Sequence[str | Path] = ()
    """Its arguments without a name"""

    @property
    def name(self) -> str:
        """What it is called in the pipeline's folder."""
        own = self.folder.name
        return f"{self.folder.parent.name}/{own}" if self.command in ("extract", "distill") else own

    @property
    def config(self) -> Path:
        """Where its YAML goes, beside its folder."""
        return self.folder.with_suffix(".yaml")

    def arguments(self, begins: bool = False) -> list[str]:
        """Its command line, which goes on where an earlier one was interrupted unless it `begins`."""
        inputs = [str(path) for path in self.inputs]
        goes_on = [] if begins else _GO_ON[self.command](self.folder)
        return [self.command, *inputs, f"--config={self.config}", *self.flags, f"--out_dir={self.folder}", *goes_on]


_GO_ON: dict[str, Callable[[Path], list[str]]] = {
    "rank": lambda folder: ["--overwrite=true"] if folder.exists() else [],
    "search": lambda folder: ["--resume=true"] if (folder / JOURNAL).is_file() else [],
    "extract": lambda folder: ["--overwrite=true"] if folder.exists() else [],
    "cache_teacher": lambda folder: ["--resume=true"] if (folder / INDEX).is_file() else [],
    "distill": lambda folder: ["--resume=auto"],
}
"""How each command is told to go on, as far as it must be told"""


class Pipeline:
    """Runs stages that are not finished yet.

    Args:
        out_dir: The pipeline's folder.
        settings: All that was asked for; a folder that was begun with other settings is refused.

    Raises:
        UserError: If the folder holds a pipeline of other settings, or something else.
    """

    def __init__(self, out_dir: Path, settings: dict[str, Any]) -> None:
        self.out_dir, self.settings = out_dir, settings
        path = out_dir / SETTINGS
        if path.is_file():
            check_settings(flatten(_read(path)), flatten(json.loads(json.dumps(settings))))
        elif out_dir.is_dir() and any(out_dir.iterdir()):
            raise UserError(
                f"out_dir must be empty, new or a pipeline's, got {str(out_dir)!r} without {SETTINGS}; choose another"
            )

    @property
    def done(self) -> list[str]:
        """The stages that are finished."""
        path = self.out_dir / DONE
        return json.loads(path.read_text()) if path.is_file() else []

    def run(self, stages: Sequence[Stage], files: Mapping[Path, str]) -> None:
        """Runs the stages that are not finished.

        Args:
            stages: All of them, in their order.
            files: What they read beside their YAMLs, by path.

        Raises:
            UserError: If one fails; it has said why itself.
        """
        self.out_dir.mkdir(parents=True, exist_ok=True)
        if not (self.out_dir / SETTINGS).is_file():
            write_text(self.out_dir / SETTINGS, to_yaml(self.settings))
        lines = [f"litgpt {shlex.join(stage.arguments(begins=True))}" for stage in stages]
        write_text(self.out_dir / COMMANDS, "\n".join([*lines, ""]))
        for stage in stages:
            stage.folder.parent.mkdir(parents=True, exist_ok=True)
            files = {**files, stage.config: to_yaml(stage.settings)}
        for path, text in files.items():
            write_text(path, text)
        for i, stage in enumerate(stages, 1):
            title = f"== {i}/{len(stages)} {stage.name}"
            if stage.name in self.done:
                print(f"{title}: done already", flush=True)
                continue
            arguments = stage.arguments()
            print(f"\n{title}\n$ litgpt {shlex.join(arguments)}", flush=True)
            if code := call([sys.executable, "-m", "litgpt_whittle", *arguments]):
                raise UserError(
                    f"the stage {stage.name} ended with exit code {code} (see above); run the same command again to "
                    "go on from there"
                )
            write_text(self.out_dir / DONE, json.dumps([*self.done, stage.name]))


def call(command: Sequence[str]) -> int:
    """Runs a command that shares this process's terminal, and hands on what tells this process to stop.

    Raises:
        KeyboardInterrupt: After Ctrl-C, which the terminal tells the command itself.
        SystemExit: After SIGTERM.
    """
    told: list[int] = []

    def stop(number: int, frame: Any) -> None:
        told.append(number)
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process = subprocess.Popen(command)
        code = process.wait()  # a command that is told to stop saves first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in told:
        raise KeyboardInterrupt
    if told:
        raise SystemExit(128 + signal.SIGTERM)
    return code


def folder_of(target: str) -> str:
    """A folder's name for a target size: `410M` for `410M±5%`."""
    return re.sub(r"[^\w.-]+", "_", re.split(r"±|\+-|\+/-", target.strip())[0].strip())


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        told = str(error).splitlines()[0]
        raise UserError(f"{str(path)!r} cannot be read ({told}); choose another out_dir") from None
