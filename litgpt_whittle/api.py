"""Python API to search, extract and distill, for instance in a notebook, in the style of litgpt's own `LLM`.

    from litgpt_whittle import distill, extract, search

    found = search("EleutherAI/pythia-160m", bin="50M", data="corpus.jsonl", iterations=200)
    student = extract(found, data="corpus.jsonl", repair=True)
    train = {"max_tokens": 10_000_000, "global_batch_size": 16, "lr_warmup_steps": 50}
    trained = distill(student, data="corpus.jsonl", train=train)
    print(found, trained.perplexity)
    trained.checkpoint.llm().generate("Once upon a time")

Settings have the names of the commands' options. A section such as `train` is a dict, as in a YAML file, or one of
litgpt's dataclasses. Everything runs in this process, on one device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.checkpoint import check_checkpoint
from litgpt_whittle.command_config import CommandConfig
from litgpt_whittle.commands.distill import DistillConfig
from litgpt_whittle.commands.extract import ExtractConfig
from litgpt_whittle.commands.search import SearchConfig
from litgpt_whittle.data import HFText
from litgpt_whittle.errors import UserError
from litgpt_whittle.pipeline.sections import Section
from litgpt_whittle.results import Checkpoint, SearchResult, TrainingResult
from litgpt_whittle.settings import describe

Data: TypeAlias = DataModule | str | Path | Mapping[str, float] | None


def search(
    checkpoint_dir: str | Path,
    bin: str | int | list[str],
    data: Data = None,
    out_dir: str | Path = "out/search",
    **settings: Any,
) -> SearchResult:
    """Search a checkpoint for its best sub-networks, as `litgpt search` does.

    Args:
        checkpoint_dir: The teacher's checkpoint directory.
        bin: Parameter count of the sub-network, such as ``410M±5%``.
        data: Data to score candidates on: a litgpt data module, the path of text for `HFText`, or a weighted mix of
            paths such as ``{"wiki.jsonl": 0.7, "code": 0.3}``.
        out_dir: Directory of the journal and the report.
        settings: Further options of `litgpt search`.

    Raises:
        UserError: In the same cases as the command.
    """
    inputs = {"checkpoint_dir": checkpoint_dir, "bin": bin, "out_dir": out_dir}
    return _call("search", SearchConfig, data, settings, inputs)


def extract(
    sub_network: SearchResult | str | Path,
    checkpoint_dir: str | Path | None = None,
    data: Data = None,
    out_dir: str | Path = "out/extract",
    **settings: Any,
) -> Checkpoint:
    """Extract a sub-network from its teacher, as `litgpt extract` does.

    Args:
        sub_network: Result of a search in one bin, or the YAML of a sub-network.
        checkpoint_dir: The teacher's checkpoint directory; not needed for the result of a search.
        data: Calibration data of a repair, as in `search`.
        out_dir: Directory of the student's checkpoint.
        settings: Further options of `litgpt extract`, such as ``repair=True``.

    Raises:
        UserError: In the same cases as the command, if the teacher is missing, or if the search had several bins.
    """
    if isinstance(sub_network, SearchResult):
        checkpoint_dir = checkpoint_dir or sub_network.teacher
        sub_network = sub_network.best_path
    if checkpoint_dir is None:
        raise UserError("extracting a sub-network needs its teacher's checkpoint; pass it as checkpoint_dir")
    inputs = {"checkpoint_dir": checkpoint_dir, "sub_network": sub_network, "out_dir": out_dir}
    return _call("extract", ExtractConfig, data, settings, inputs)


def distill(
    student: Checkpoint | str | Path,
    teacher: str | Path | None = None,
    data: Data = None,
    out_dir: str | Path = "out/distill",
    **settings: Any,
) -> TrainingResult:
    """Pretrain a student with its teacher's help, as `litgpt distill` does.

    Args:
        student: The result of `extract`, or a student's checkpoint directory.
        teacher: The teacher's checkpoint directory; by default the one that the student was extracted from.
        data: Data for training and validation, as in `search`.
        out_dir: Directory of the checkpoints and metrics.
        settings: Further options of `litgpt distill`, such as ``train={"max_tokens": 10_000_000}``.

    Raises:
        UserError: In the same cases as the command.
    """
    for name, argument in (("initial_checkpoint_dir", "student"), ("teacher_checkpoint_dir", "teacher")):
        if name in settings:
            raise UserError(f"{name} is called {argument} here, got {settings[name]!r}; pass it as {argument}=")
    student = student if isinstance(student, Checkpoint) else Checkpoint(extend_checkpoint_dir(Path(student)))
    check_checkpoint(student.folder)
    teacher = teacher or student.origin.get("checkpoint_dir")
    inputs = {"initial_checkpoint_dir": student.folder, "out_dir": out_dir}
    if teacher is not None and "teacher_cache" not in settings:
        inputs["teacher_checkpoint_dir"] = teacher
    return _call("distill", DistillConfig, data, settings, inputs)


def _call(name: str, config: type[CommandConfig], data: Data, settings: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """Run a command with settings parsed by the command's own parser, and return its result."""
    settings = {"devices": 1} | settings
    if settings["devices"] != 1:
        raise UserError(
            f"from Python, {name} runs on one device, got devices = {settings['devices']}; for more, run "
            f"'litgpt {name}' in a shell"
        )
    if not isinstance(data, DataModule | str | Path | Mapping | None):
        raise UserError(
            f"data must be a litgpt data module, a path, or a mapping of paths to weights, got {data!r}; "
            "see tutorials/data.md"
        )
    if isinstance(data, str | Path | Mapping):
        data = HFText(path=dict(data) if isinstance(data, Mapping) else str(data))
    given = {key: describe(value) for key, value in (settings | inputs).items()}
    command: Any = Section(name, config, given).parse()
    command.data = data  # the object itself, not one rebuilt from its description
    return command.run()
