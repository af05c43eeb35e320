"""Base class of the kinds of stages that `litgpt whittle` runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.checkpoint import has_tokenizer
from litgpt_whittle.command_config import CommandConfig
from litgpt_whittle.data.tokenizer_content import encoding_fingerprint
from litgpt_whittle.errors import UserError
from litgpt_whittle.manifest import without
from litgpt_whittle.pipeline.costs import Cost
from litgpt_whittle.pipeline.sections import Section, merge
from litgpt_whittle.settings import describe, flatten
from litgpt_whittle.spaces.bins import Bin

if TYPE_CHECKING:
    from litgpt_whittle.pipeline.stages import Stages

C = TypeVar("C", bound=CommandConfig)

Given = bool | dict[str, Any] | None
"""A section as the user gives it: settings; true or false to run the stage or not; None for the default"""

PROVIDED = (
    *("checkpoint_dir", "out_dir", "bin", "resume", "overwrite", "dry_run", "sub_network", "random_weights"),
    *("initial_checkpoint_dir", "model_name", "model_config", "teacher_cache"),
)
"""Arguments of the commands that the pipeline itself provides"""


@dataclass(frozen=True)
class Request:
    """Inputs of a pipeline that concern all stages, or in a cascade those of one student."""

    checkpoint_dir: Path
    """The teacher that students are cut from"""
    bins: dict[str, Bin]
    """Bins by the names of the students' folders"""
    out_dir: Path
    data: DataModule | None
    devices: int | str
    seed: int
    has_baseline: bool
    distill_from: Path | None = None
    """The teacher of the distillation, if students are cut from another teacher"""
    uncorrected: Path | None = None
    """The original teacher if it is corrected first; `checkpoint_dir` is then the corrected teacher"""
    shared_dir: Path | None = None
    """Folder of the stages that run once for all students of the request; None for `out_dir`"""
    shares_cache: bool = False
    """True if other requests distill from the same teacher, so that one cache serves them all"""
    stand_ins: Mapping[Path, Path] = field(default_factory=dict)
    """Existing checkpoints of the same architecture, for checks, keyed by checkpoints that stages have yet to write"""

    @property
    def teacher_dir(self) -> Path:
        """The teacher of the distillation."""
        return self.distill_from or self.checkpoint_dir

    def existing(self, checkpoint_dir: Path) -> Path:
        """Return a checkpoint, or its stand-in if a stage has yet to write it."""
        return self.stand_ins.get(checkpoint_dir, checkpoint_dir)


@dataclass(frozen=True)
class StageRun:
    """One run of a command, with the settings of its YAML and its command line."""

    kind: type[Stage]
    name: str
    """Name of the stage: its folder, relative to the pipeline's"""
    folder: Path
    """The command's out_dir"""
    settings: dict[str, Any] = field(default_factory=dict)
    """Contents of the command's YAML"""
    flags: Sequence[str] = ()
    """Flags for this command from the pipeline's command line"""
    inputs: Sequence[str | Path] = ()
    """The command's positional arguments"""

    @property
    def command(self) -> str:
        """Name of the command."""
        return self.kind.command or self.kind.name

    @property
    def config_path(self) -> Path:
        """Path of the YAML, next to the stage's folder."""
        return self.folder.with_suffix(".yaml")

    @property
    def options(self) -> dict[str, str]:
        """All settings, by the names of the command's arguments."""
        options = flatten(self.settings) | dict(flag.removeprefix("--").split("=", 1) for flag in self.flags)
        options |= dict(zip(("checkpoint_dir", "sub_network"), self.inputs))
        return {name: str(value) for name, value in options.items()}

    @property
    def determining_options(self) -> dict[str, str]:
        """Settings that can change the output."""
        options = without(self.options, self.kind.config.FREE)
        folder = extend_checkpoint_dir(Path(options.get("tokenizer_dir", "None")))
        if has_tokenizer(folder):  # an equal tokenizer in another folder gives the same output
            options["tokenizer_dir"] = encoding_fingerprint(folder)
        return options

    def option(self, name: str) -> str:
        """Return the name of a command's argument on the pipeline's command line."""
        return "target" if name == "bin" else f"{self.kind.name}.{name}"

    def needs(self, other: StageRun) -> bool:
        """Return whether this stage reads the output of another one."""
        return any(Path(value).is_relative_to(other.folder) for value in self.options.values())

    def arguments(self, more: Sequence[str] = ()) -> list[str]:
        """Return the command line.

        Args:
            more: Further flags, such as those that resume an interrupted run.
        """
        inputs = [str(path) for path in self.inputs]
        return [self.command, *inputs, f"--config={self.config_path}", *self.flags, f"--out_dir={self.folder}", *more]


def parents(name: str) -> list[str]:
    """Return the dotted names of the sections that contain an argument: `a` and `a.b` for `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


class Stage(ABC, Generic[C]):
    """A command as a part of the pipeline: its section, its runs, its checks, its costs and its pictures.

    Kinds are listed in `litgpt_whittle.pipeline.kinds.STAGES`, in the order of their runs.

    Args:
        stages: All kinds, which may depend on one another.
        given: The user's section.
    """

    name: ClassVar[str]
    """Name of the section"""
    command: ClassVar[str] = ""
    """Name of the command, if it differs from the section's"""
    config: ClassVar[type[CommandConfig]]
    folder_name: ClassVar[str]
    """Name of the folder of its output"""
    restart_flag: ClassVar[str] = ""
    """Flag to replace an unfinished output, for a command that cannot resume"""
    is_per_student: ClassVar[bool] = False
    """True if the stage runs once for each student, in the student's folder"""

    def __init__(self, stages: Stages, given: Given) -> None:
        self.stages, self.request, self.asked = stages, stages.request, given
        self.given = given if isinstance(given, dict) else {}

    @property
    def is_used(self) -> bool:
        """True if the pipeline runs this stage."""
        return True

    @cached_property
    def section(self) -> Section[C]:
        """The section, with the settings that the pipeline adds.

        Raises:
            UserError: If the user sets an argument that the pipeline provides.
        """
        return self.new_section()

    def new_section(self, **defaults: Any) -> Section[C]:
        """Return the user's section with some defaults, and with the pipeline's data and seed."""
        for argument, value in self.given.items():
            if argument.partition(".")[0] in PROVIDED and value not in (None, False):
                raise UserError(f"{self.name}.{argument} is set by the pipeline; remove it")
            off = next((name for name in parents(argument) if self.given.get(name) is False), None)
            if off is not None:
                raise UserError(f"{self.name}.{off} is false, and {self.name}.{argument} is set; remove one of the two")
        common = {"seed": self.request.seed} | ({"data": describe(self.request.data)} if self.request.data else {})
        config: Any = self.config
        return Section(self.name, config, self.given, common | defaults)

    @cached_property
    def args(self) -> C:
        """The command's config.

        Raises:
            UserError: If the command does not accept the section.
        """
        return self.section.parse(checkpoint_dir=self.request.existing(self.request.checkpoint_dir))

    def read(self) -> None:
        """Read the section.

        Raises:
            UserError: If the command does not accept it.
        """
        _ = self.args

    def validate(self) -> None:
        """Run the command's checks that need no output of an earlier stage.

        Raises:
            UserError: For the first invalid setting.
        """
        self.section.run_check(self.args.validate)

    def folder(self, student: str = "") -> Path:
        """Return the output folder; `student` matters only if the stage runs once for each student."""
        shared = self.request.shared_dir or self.request.out_dir
        return (self.request.out_dir / student if self.is_per_student else shared) / self.folder_name

    def title(self, student: str = "") -> str:
        """Return the name of the stage's run."""
        return self._name_of(self.folder(student))

    def _name_of(self, folder: Path) -> str:
        return folder.relative_to(self.request.out_dir).as_posix()

    def runs(self, student: str = "") -> list[StageRun]:
        """Return the stage's runs; if it runs once for each student, the runs for `student`."""
        return [self.new_run(self.folder(), self.request.checkpoint_dir)]

    def new_run(self, folder: Path, *inputs: Path, **more: Any) -> StageRun:
        """Return a run into a folder, with the positional arguments and further settings given."""
        settings = merge(self.section.settings, more)
        return StageRun(type(self), self._name_of(folder), folder, settings, self.section.flags, inputs)

    def files(self) -> dict[Path, str]:
        """Return the contents of further files that the stage reads, by path."""
        return {}

    @abstractmethod
    def costs(self, student: str = "") -> list[Cost]:
        """Return the cost of each of `runs`."""

    @classmethod
    def can_resume(cls, folder: Path) -> bool:
        """Return whether the command can resume from a folder; if not, it starts again."""
        return False

    @classmethod
    def resume_flags(cls, folder: Path) -> list[str]:
        """Return the flags with which the command resumes, or replaces an unfinished output."""
        if cls.can_resume(folder):
            return ["--resume=true"]
        return [cls.restart_flag] if cls.restart_flag and folder.exists() else []

    @classmethod
    def pictures(cls, folder: Path) -> list[tuple[str, Path]]:
        """Return (title, path) pairs of the pictures in `folder` that the report shows if they exist."""
        return []
