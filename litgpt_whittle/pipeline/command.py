"""`litgpt whittle`: run the other commands in turn, from a teacher to trained students of given sizes."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir, init_out_dir

import litgpt_whittle.data  # noqa: F401  lets the command line find HFText by its bare name
from litgpt_whittle.batches import sequence_length
from litgpt_whittle.checkpoint import check_checkpoint, weights_fingerprint
from litgpt_whittle.command_config import CommandConfig, Result, as_command
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_writable, readable_size
from litgpt_whittle.pipeline.cascade import CascadeArgs, Chain
from litgpt_whittle.pipeline.correct_teacher import CorrectTeacherStage
from litgpt_whittle.pipeline.costs import cost_table
from litgpt_whittle.pipeline.estimates import measure_speed
from litgpt_whittle.pipeline.kinds import STAGE_OF
from litgpt_whittle.pipeline.outcome import PAGE, write_outcome
from litgpt_whittle.pipeline.run import Pipeline, folder_of
from litgpt_whittle.pipeline.sections import own_flags
from litgpt_whittle.pipeline.stage import Request
from litgpt_whittle.pipeline.tasks import TEACHER, measure_models, task_cost, task_table
from litgpt_whittle.reports.report import as_text
from litgpt_whittle.results import Checkpoint, TrainingResult, WhittleResult
from litgpt_whittle.setting_checks import changed
from litgpt_whittle.spaces.bins import Bin, parse_bins
from litgpt_whittle.tasks import TaskArgs, TaskSet
from litgpt_whittle.tasks.harness import read_tasks

logger = logging.getLogger(__name__)

Section = dict
"""Type of the settings of a stage; jsonargparse reads it as a mapping"""


@dataclass
class WhittleConfig(CommandConfig):
    """Turn a teacher into trained students: rank, search, extract and repair, distill, report.

    Each stage runs the command of the same name with the settings in its section, which may include its own ``data``.
    Run the same command again to resume after an interruption.
    """

    checkpoint_dir: Path
    """The teacher's checkpoint directory."""
    target: str | int | float | list[str | int | float] | None = None
    """Parameter count of the student, in the format of ``litgpt search --bin`` (410M±5%), or of several students,
    separated by commas. Several students share the ranking and the cached teacher, unless they form a ``cascade``."""
    data: DataModule | None = None
    """Data of all stages: any litgpt data module, or ``--data HFText --data.path PATH``."""
    out_dir: Path = Path("out/whittle")
    """Directory of the stages' folders, the students and the report."""
    cascade: bool | CascadeArgs = False
    """If true, cut each student from the one before, once that is distilled: ``--target 600M,400M --cascade true``. Or
    settings such as ``--cascade.teacher nearest``. By default, all students are cut from the teacher."""
    correct_teacher: Section | None = None
    """Fine-tune the teacher on the training text first: ``--correct_teacher.max_tokens 100000000``, optionally
    ``--correct_teacher.lr``, which is a fifth of the distillation's by default; see ``litgpt distill --help`` for all
    settings. By default, the teacher stays as it is."""
    rank: bool | Section | None = None
    """If true, rank the teacher's units first, so that coarse search spaces keep the most important ones. True by
    default for coarse spaces. Or settings such as ``--rank.tokens 100000``; see ``litgpt rank --help``."""
    search: Section | None = None
    """Settings such as ``--search.iterations 1000``, see ``litgpt search --help``."""
    extract: Section | None = None
    """Settings such as ``--extract.repair.tokens 100000``, see ``litgpt extract --help``. Students are repaired unless
    ``--extract.repair false``."""
    cache_teacher: bool | Section | None = None
    """If true, cache the teacher's outputs. This is the default for several students. Or settings such as
    ``--cache_teacher.codec top_k``, see ``litgpt cache_teacher --help``."""
    distill: Section | None = None
    """Settings such as ``--distill.train.max_tokens 1000000000``, which is required; see ``litgpt distill --help``."""
    tasks: TaskArgs = field(default_factory=TaskArgs)
    """Tasks of lm-eval to measure the teacher and the students on at the end: plain cut, repaired and
    distilled."""
    baseline: bool = False
    """Also train each student's architecture from random weights, without the teacher, on as many tokens."""
    devices: int | str = 1
    """Devices for each stage that can use several."""
    seed: int = 42
    """The random seed of all stages."""
    dry_run: bool = False
    """Check everything, print the stages with their estimated costs, and stop."""

    def __post_init__(self) -> None:
        self.checkpoint_dir, self.out_dir = extend_checkpoint_dir(Path(self.checkpoint_dir)), init_out_dir(self.out_dir)

    def validate(self) -> None:
        """Check the pipeline's own arguments; `run` checks those of the stages, which depend on one another.

        Raises:
            UserError: For the first invalid argument.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                "litgpt whittle must be started once, on one machine; on several machines, run the stages one by one"
            )
        if self.target is None:
            raise UserError("the target size is missing; set the student's number of parameters, such as --target 410M")
        if not self.tasks.names and (unused := changed(self.tasks)):
            raise UserError(
                f"tasks.{unused[0]} has no effect without tasks to measure; add --tasks.names '[hellaswag]', or leave "
                "it out"
            )
        check_writable(self.out_dir)
        check_checkpoint(self.checkpoint_dir)

    def run(self) -> Result:
        """Run the stages that are not finished, and write the report.

        Returns:
            The trained students, as a `WhittleResult`; after a dry run, a `Result` with the estimated costs.

        Raises:
            UserError: For the first invalid argument, before the first stage; or if a stage fails.
        """
        self.validate()
        settings = {name: value for name, value in self.arguments().items() if name not in ("out_dir", "dry_run")}
        pipeline = Pipeline(self.out_dir, settings | {"teacher": weights_fingerprint(self.checkpoint_dir)})
        request = Request(
            self.checkpoint_dir,
            _targets(self.target),
            self.out_dir,
            self.data,
            self.devices,
            self.seed,
            self.baseline,
        )
        given = {name: getattr(self, name) for name in STAGE_OF}
        cascade = CascadeArgs() if self.cascade is True else self.cascade or None
        with tempfile.TemporaryDirectory() as folder:
            chain = Chain.of(request, given, cascade, Path(folder))
            pipeline.check(chain.all())
            memory = chain.check()
            length = sequence_length(chain.links[0].teacher, None)
            tasks = read_tasks(self.tasks, self.checkpoint_dir, length) if self.tasks.names else None
            if self.dry_run:
                return Result(self.out_dir, summary=_estimates(chain, memory, tasks))
            stages, files, sources = chain.all(), chain.files(), chain.sources()
        measured = []
        try:
            pipeline.run(stages, files)
            if tasks is not None:
                teachers = {TEACHER: self.checkpoint_dir}
                if self.correct_teacher is not None:
                    teachers["corrected teacher"] = CorrectTeacherStage.checkpoint(self.out_dir)
                measured = task_table(measure_models(self.out_dir, sources, teachers, tasks))
        except KeyboardInterrupt:
            raise UserError("interrupted; run the same command again to resume") from None
        names = list(request.bins)
        rows = write_outcome(self.out_dir, names, Checkpoint(self.checkpoint_dir), measured, cascade is not None)
        tables = "\n\n".join(map(as_text, filter(None, (rows, measured))))
        students = [TrainingResult(self.out_dir / name / "distilled") for name in names]
        where = f"The report is {self.out_dir / PAGE}; students are in {self.out_dir}/*/distilled/final"
        return WhittleResult(self.out_dir, students, summary=f"\n{tables}\n{where}")


setup = as_command(WhittleConfig)


def _estimates(chain: Chain, memory: str, tasks: TaskSet | None) -> str:
    """Return the estimated memory, disk space, and costs of all stages as text."""
    lines = [memory]
    if n_bytes := chain.cache_bytes():
        lines.append(f"Disk for the teacher's cache: {readable_size(n_bytes)}")
    logger.info("Measuring the speed of this machine on single blocks …")
    found = [*chain.costs(), *([] if tasks is None else [task_cost(chain.links, tasks)])]
    return "\n".join([*lines, as_text(cost_table(found, measure_speed(chain.links[0])))])


def _targets(target: str | int | float | list[str | int | float] | None) -> dict[str, Bin]:
    """Return the bins by the names of their students' folders."""
    texts = target.split(",") if isinstance(target, str) else target if isinstance(target, list) else [target]
    try:
        bins = parse_bins([*texts])
    except UserError as error:
        raise UserError(f"target: {own_flags(str(error), 'search')}") from None
    named = dict(zip((folder_of(str(text)) for text in texts), bins))
    if len(named) < len(bins):
        raise UserError(f"targets must differ in the size before '±', got {target!r}; give ranges instead")
    return named
