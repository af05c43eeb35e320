"""Select among a search's best candidates by short distillations in rungs, each with fewer students and more tokens.

Training can change the ranking of candidates, which motivates training-aware selection (DarwinLM, arXiv 2502.07780).
Every rung trains its students from scratch, so that each gets a complete learning-rate schedule of the rung's length.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from litgpt_whittle.checkpoint import check_checkpoint, load_model
from litgpt_whittle.errors import UserError
from litgpt_whittle.evaluations import scored
from litgpt_whittle.files import from_yaml, to_yaml, write_text
from litgpt_whittle.journal import Evaluation
from litgpt_whittle.processes import own_device
from litgpt_whittle.quantities import parse_amount
from litgpt_whittle.recipes import find_recipe
from litgpt_whittle.searching.args import SelectionArgs
from litgpt_whittle.setting_checks import changed
from litgpt_whittle.tasks.task_set import LOSS, TaskSet
from litgpt_whittle.tensors import default_precision, weights_dtype
from litgpt_whittle.training.compiler import check_compiler
from litgpt_whittle.watchdog import stop_with_parent

FOLDER = "selection"
"""Folder of the students and their training in a search's folder"""

RESULTS = "selection.json"
"""File name of the rungs' results in a search's folder"""


@dataclass(frozen=True)
class Rung:
    """One rung of the selection."""

    n: int
    """Number of students to train"""
    tokens: int
    """Training tokens per student"""

    @classmethod
    def parse(cls, text: str) -> Rung:
        """Parse students x tokens, such as `8x200k`.

        Raises:
            UserError: If the text does not have this form.
        """
        n, _, tokens = str(text).partition("x")
        if not n.strip().isdigit() or int(n) < 1 or not tokens:
            raise UserError(f"a rung must have the form students x tokens, got {text!r}; write for example 8x200k")
        return cls(int(n), int(parse_amount(tokens, "tokens")))


@dataclass(frozen=True)
class RungResult:
    """Result of a candidate in a rung."""

    rung: int
    bin: str
    evaluation: int
    """Index of the candidate in the journal"""
    tokens: int
    val_loss: float
    task_loss: float | None = None
    """Loss on the search's tasks (`TaskSet.scores`), which then ranks the students; None if the search has no tasks"""

    @property
    def loss(self) -> float:
        """The loss that ranks the students."""
        return self.val_loss if self.task_loss is None else self.task_loss


def parse_rungs(args: SelectionArgs, to_come: Collection[Path] = ()) -> list[Rung]:
    """Parse and check the rungs.

    Args:
        args: Settings of the selection.
        to_come: Files that do not exist yet, whose contents are not checked.

    Raises:
        UserError: If a rung is invalid or does not have fewer students and more tokens than the one before, or if only
            one of the rungs and the training config is given.
    """
    rungs = [Rung.parse(text) for text in args.rungs]
    for before, after in zip(rungs, rungs[1:]):
        if after.n >= before.n or after.tokens <= before.tokens:
            raise UserError(
                "each of selection.rungs must have fewer students and more tokens than the one before, got "
                f"{before.n}x{before.tokens} and then {after.n}x{after.tokens}; change one of them"
            )
    if rungs and args.config is None:
        raise UserError(
            "selection.rungs need selection.config, a YAML file of litgpt distill with data and batch sizes"
        )
    if not rungs and (unused := changed(args)):
        raise UserError(
            f"selection.{unused[0]} has no effect without selection.rungs; add rungs such as [8x200k, 2x1M], or leave "
            "it out"
        )
    if args.config is not None and args.config not in to_come and _read_config(args.config).get("compile", True):
        check_compiler()
    return rungs


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = from_yaml(Path(find_recipe(path)).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read selection.config {str(path)!r}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or "data" not in content:
        raise UserError(
            f"selection.config {str(path)!r} must be a YAML file of litgpt distill with a data section; add the section"
        )
    train = content.get("train") or {}
    # the command's own parser accepts quoted numbers
    return content | {"train": {name: from_yaml(v) if isinstance(v, str) else v for name, v in train.items()}}


class Selection:
    """Trains the best candidates of a search and ranks them by their loss on tasks, or else on validation data.

    Each student is extracted and trained by `litgpt extract` and `litgpt distill` in separate processes. Finished
    steps are reused after an interruption.

    Args:
        checkpoint_dir: The teacher's checkpoint.
        out_dir: The search's folder.
        args: Rungs and training config.
        devices: Devices for the training.
        tasks: Tasks that the search scores its candidates on, if any.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        out_dir: Path,
        args: SelectionArgs,
        devices: int | str = 1,
        tasks: TaskSet | None = None,
    ) -> None:
        self.checkpoint_dir, self.out_dir, self.args, self.devices = checkpoint_dir, out_dir, args, devices
        self.tasks = tasks
        self.rungs = parse_rungs(args)
        assert args.config is not None, "a selection has rungs, which need a config"
        self.config = _read_config(args.config)

    def run(self, evaluations: Sequence[Evaluation], score: str) -> dict[str, Evaluation]:
        """Run all rungs for every bin.

        Returns:
            The winner of each bin: the best student of the last rung.
        """
        bins = dict.fromkeys(evaluation.bin for evaluation in evaluations)
        ranked = {
            bin: sorted(
                (e for e in scored(evaluations, score) if e.bin == bin and not e.dropped),
                key=lambda e: (e.score(score), e.index),
            )
            for bin in bins
        }
        n_students = sum(min(rung.n, len(own)) for own in ranked.values() for rung in self.rungs)
        results: list[RungResult] = []
        winners = {}
        with tqdm(total=n_students, desc="selection", unit="student", dynamic_ncols=True) as bar:
            for bin, left in ranked.items():
                for i, rung in enumerate(self.rungs):
                    found = []
                    for evaluation in left[: rung.n]:
                        val_loss = self._train(evaluation, rung)
                        losses = val_loss, self._task_loss(self._trained(evaluation, rung))
                        found.append(RungResult(i, bin, evaluation.index, rung.tokens, *losses))
                        bar.update()
                    results += found
                    order = {r.evaluation: r.loss for r in found}
                    left = sorted(left[: rung.n], key=lambda e: (order[e.index], e.index))
                    write_text(self.out_dir / RESULTS, json.dumps([asdict(r) for r in results], indent=1))
                if left:
                    winners[bin] = left[0]
        return winners

    def _train(self, evaluation: Evaluation, rung: Rung) -> float:
        """Train a candidate's student for the rung's tokens and return the validation loss."""
        trained = self._trained(evaluation, rung)
        folder, student = trained.parent, trained.parent / "student"
        subnet, repair, settings = (
            folder / f"{name}.yaml" for name in ("sub_network", "extract", f"train-{rung.tokens}")
        )
        how = {"repair": True, "data": _for_repair(self.config["data"])} if self.args.repair else {"repair": False}
        contents = {subnet: to_yaml(evaluation.subnet), repair: to_yaml(how), settings: to_yaml(self._settings(rung))}
        # outputs made from a different sub-network or settings are not reused
        differ = [path for path, text in contents.items() if path.is_file() and path.read_text() != text]
        if differ:
            shutil.rmtree(trained if differ == [settings] else folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        if not (student / "lit_model.pth").is_file():
            for path in (subnet, repair):
                write_text(path, contents[path])
            where = [self.checkpoint_dir, subnet, f"--config={repair}", f"--out_dir={student}"]
            self._call("extract", *where, log=folder / "extract.log")
        if not (trained / "final/lit_model.pth").is_file():
            write_text(settings, contents[settings])
            flags = [f"--initial_checkpoint_dir={student}", f"--out_dir={trained}", f"--devices={self.devices}"]
            self._call("distill", f"--config={settings}", *flags, "--resume=auto", log=settings.with_suffix(".log"))
        rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        return [row["val_loss"] for row in rows if "val_loss" in row][-1]

    def _trained(self, evaluation: Evaluation, rung: Rung) -> Path:
        """Return the folder of a candidate's training."""
        return self.out_dir / FOLDER / f"candidate-{evaluation.index}" / f"trained-{rung.tokens}"

    def _task_loss(self, trained: Path) -> float | None:
        """Return a trained student's loss on the tasks; None without tasks."""
        if self.tasks is None:
            return None
        model = load_model(trained / "final", dtype=weights_dtype(default_precision()), device=own_device())
        return self.tasks.scores(self.tasks.measure(model))[LOSS]

    def _settings(self, rung: Rung) -> dict[str, Any]:
        """Return the user's settings with the rung's number of tokens, and warmup limited to a tenth of the steps."""
        train = dict(self.config.get("train") or {})
        length = train.get("max_seq_length") or check_checkpoint(self.checkpoint_dir).block_size
        steps = rung.tokens // (train.get("global_batch_size", 512) * length)
        train |= {"max_tokens": rung.tokens, "save_interval": None}
        evaluated = dict(self.config.get("eval") or {}) | {"final_validation": True}  # students are ranked by it
        train |= {"lr_warmup_steps": min(train.get("lr_warmup_steps") or 2000, max(steps // 10, 1))}
        model = ("initial_checkpoint_dir", "sub_network", "model_name", "model_config")
        dropped = {*model, "resume", "out_dir", "devices"}
        teacher = self.config.get("teacher_checkpoint_dir") or str(self.checkpoint_dir)
        own = {"teacher_checkpoint_dir": str(teacher), "train": train, "eval": evaluated}
        return {k: v for k, v in self.config.items() if k not in dropped} | own

    def _call(self, command: str, *arguments: Any, log: Path) -> None:
        """Run one of our commands and write its output to a file."""
        environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
        with open(log, "w") as file:
            line = [sys.executable, "-m", "litgpt_whittle", command, *map(str, arguments)]
            more: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "preexec_fn": stop_with_parent}
            code = subprocess.run(line, env=environment, **more).returncode
        if code:
            last = (log.read_text().strip().splitlines() or ["nothing was printed"])[-1]
            raise UserError(f"litgpt {command} failed within the selection ({last}); see {str(log)!r}")


_OF_A_RANK = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Environment variables of the search's own process group, which must not reach the commands"""


def read_results(out_dir: Path) -> list[RungResult]:
    """Return the results of a search's rungs; an empty list without a selection."""
    path = Path(out_dir) / RESULTS
    return [RungResult(**row) for row in json.loads(path.read_text())] if path.is_file() else []


def rung_table(results: Sequence[RungResult], evaluations: Sequence[Evaluation], score: str) -> list[list[str]]:
    """Return a table of each candidate's rank by the score and in every rung that it reached, with a header row.

    The last row of each bin shows Kendall's τ between the ranking of each rung and the ranking before it, over the
    candidates of the rung.
    """
    rungs = sorted({result.rung for result in results})
    tokens = {result.rung: result.tokens for result in results}
    rows = [["bin", "candidate", f"by {score}", *(f"after {tokens[rung]:,} tokens" for rung in rungs)]]
    for bin in dict.fromkeys(result.bin for result in results):
        own = {rung: {r.evaluation: r.loss for r in results if (r.bin, r.rung) == (bin, rung)} for rung in rungs}
        before = {index: evaluations[index].score(score) for index in own[rungs[0]]}
        columns = [before, *own.values()]
        ranks = [_ranks(column) for column in columns]
        for index in sorted(before, key=lambda index: [rank.get(index, len(before)) for rank in reversed(ranks)]):
            cells = [
                f"{rank[index]} ({column[index]:.4g})" if index in column else ""
                for rank, column in zip(ranks, columns)
            ]
            rows.append([bin, str(index), *cells])
        taus = [_tau(one, two) for one, two in zip(columns, columns[1:])]
        rows.append([bin, "Kendall's τ", "", *taus])
    return rows


def _ranks(values: Mapping[int, float]) -> dict[int, int]:
    return {index: rank for rank, index in enumerate(sorted(values, key=lambda i: (values[i], i)), 1)}


def _tau(before: Mapping[int, float], after: Mapping[int, float]) -> str:
    from scipy.stats import kendalltau

    if len(after) < 2:
        return ""
    return f"{kendalltau([before[i] for i in after], list(after.values())).statistic:.2f}"


def _for_repair(data: Any) -> Any:
    """Return the settings of a training's data without `reset_attention`, which repairs do not support."""
    if not isinstance(data, Mapping) or "init_args" not in data:
        return data
    settings = {name: value for name, value in data["init_args"].items() if name != "reset_attention"}
    return {**data, "init_args": settings}
