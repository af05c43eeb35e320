"""Steps of `litgpt search`: the plan, the text to score on, and the search itself."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from litgpt.config import Config
from litgpt.data import DataModule

from litgpt_whittle.batches import (
    Batch,
    calibration_windows,
    check_shared,
    fingerprint,
    sequence_length,
    validation_batches,
)
from litgpt_whittle.checkpoint import check_checkpoint, load_model, read_weights, weights_fingerprint
from litgpt_whittle.command_config import Interrupted
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.data.loading import connect, packing_of
from litgpt_whittle.document_masks import reset_attention
from litgpt_whittle.errors import UserError
from litgpt_whittle.evaluations import best_of
from litgpt_whittle.families import (
    FAMILIES,
    family_name,
)
from litgpt_whittle.fitness import Fitness
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.hints import try_next
from litgpt_whittle.journal import (
    Evaluation,
)
from litgpt_whittle.metrics import MeasureArgs
from litgpt_whittle.processes import (
    each,
    on_rank_zero,
    parallel_map,
    rank,
    release_memory,
    shutdown,
)
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.reports.fronts import save_fronts
from litgpt_whittle.reports.report import as_text, write_report
from litgpt_whittle.results import SearchResult
from litgpt_whittle.searching.loop import Loop, Record, Search
from litgpt_whittle.searching.measuring import MEASUREMENTS, measurement_names, take_measurements
from litgpt_whittle.searching.objectives import objective_measures, objective_names
from litgpt_whittle.searching.outcome import best_name, save_subnet, save_surrogates
from litgpt_whittle.searching.racing_loop import NOTES, RaceNotes, RacingLoop
from litgpt_whittle.searching.selection import Selection, read_results, rung_table
from litgpt_whittle.searching.starting import STARTS, give_starts, order_of_units, text_to_measure
from litgpt_whittle.spaces.args import (
    SpaceArgs,
)
from litgpt_whittle.spaces.limits import Limits
from litgpt_whittle.spaces.sizes import decided
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies import Strategy
from litgpt_whittle.strategies.surrogate_search import with_surrogate
from litgpt_whittle.subnet import fingerprint as config_fingerprint
from litgpt_whittle.supergpt import is_tied
from litgpt_whittle.tasks import TaskBatch, TaskSet
from litgpt_whittle.tensors import weights_dtype
from litgpt_whittle.training.sharding import load_sharded
from litgpt_whittle.vocabulary.text_bytes import n_text_bytes

if TYPE_CHECKING:
    from litgpt_whittle.commands.search import SearchConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchPlan:
    """A search before its data is read: the spaces, one per bin, and the strategies that search them."""

    teacher: Config
    seq_length: int
    search_space: SpaceArgs
    """The space's settings, with defaults that depend on the teacher"""
    ranking: Ranking | None
    strategy: Strategy
    surrogate_settings: dict[str, Any]
    limits: Limits
    searches: list[Search]

    @classmethod
    def of(cls, config: SearchConfig) -> SearchPlan:
        """Return the plan for a command's arguments.

        Raises:
            UserError: If a bin holds no sub-network, or the strategy cannot search it.
        """
        teacher = check_checkpoint(config.checkpoint_dir)
        seq_length = sequence_length(teacher, config.train.max_seq_length)
        tied = is_tied(read_weights(config.checkpoint_dir))
        ranking, strategy, ranges = config.ranking(), config.made_strategy, config.limit.ranges()
        units = cast(Ranking, ranking).order if config.order == "importance" else None
        limits = Limits(ranges, teacher, MeasureArgs(seq_length, tied=tied)) if ranges else Limits()
        name, objectives = config.measure.name, [*strategy.objectives, *limits.ranges]
        measures = objective_measures(objectives, name, teacher, seq_length, tied)
        searcher, surrogate_settings = with_surrogate(strategy, config.surrogate, teacher, ranking, config.seed)
        search_space = decided(config.search_space, teacher)
        spaces = [Space(teacher, config.space, bin, tied, search_space, units, limits) for bin in config.bins]
        searches = [Search.begin(space, searcher, name, config.seed, measures) for space in spaces]
        measurement_names(searches)  # a strategy rejects a bin before anything is loaded
        return cls(teacher, seq_length, search_space, ranking, strategy, surrogate_settings, limits, searches)

    def settings(self, config: SearchConfig, has_starts: bool) -> dict[str, Any]:
        """Return everything that the search depends on besides teacher and data, for the journal.

        Args:
            config: The command's arguments.
            has_starts: True if the search begins with simple starts.
        """
        measure, ranking, race = config.measure, self.ranking, config.racing_args
        return {
            "space": config.space,
            # older journals lack `convertible` and `drop`, and their spaces did not have them
            "search_space": {
                k: v
                for k, v in asdict(self.search_space).items()
                if (k != "convertible" or v) and (k != "drop" or v != SpaceArgs().drop)
            },
            "order": config.order,
            "importance": ranking and (ranking.scores_fingerprint if measure.needs_importance else ranking.fingerprint),
            "bin": [str(search.space.bin) for search in self.searches],
            "limits": self.limits.settings,
            "strategy": type(self.strategy).__name__,
            "strategy_settings": self.strategy.settings,
            **({"surrogate": self.surrogate_settings} if self.surrogate_settings else {}),
            # absent if false, as in journals older than this option
            **({"simple_starts": True} if has_starts else {}),
            "fitness": config.fitness,
            **({"tasks": asdict(config.tasks)} if measure.needs_tasks else {}),
            "score": measure.name,
            "racing": asdict(race) if race else None,
            "objectives": objective_names(self.strategy.objectives, measure.name),
            "seed": config.seed,
            "precision": config.used_precision,
            "micro_batch_size": config.train.micro_batch_size,
            "max_seq_length": self.seq_length,
            "max_iters": config.eval.max_iters,
        }


@dataclass(frozen=True)
class ScoringText:
    """Text that candidates are scored on, and that repairs are fitted to."""

    data: DataModule | None
    """The connected data module; None if the fitness measure reads no data"""
    batches: Sequence[Batch | TaskBatch]
    calibration: torch.Tensor | None
    """Token ids (N, T); None if the fitness measure needs none"""
    tasks: TaskSet | None = None
    """The tasks, whose batches are `batches`; None if the fitness measure needs none"""

    @classmethod
    def read(cls, config: SearchConfig, plan: SearchPlan) -> ScoringText:
        """Read the text that the fitness measure needs; all processes must read the same text.

        Raises:
            UserError: If there is too little text, or the processes have read different text.
        """
        measure, data, tasks = config.measure, config.data, config.task_set
        batches: Sequence[Batch | TaskBatch] = [] if tasks is None else tasks.batches
        if not measure.needs_data():
            return cls(None, batches, None, tasks)
        assert data is not None, "validate has checked it"
        n = measure.n_calibration
        connect(data, config.checkpoint_dir, config.train.micro_batch_size, plan.seq_length, validation_only=not n)
        if measure.reads_data:
            batches = validation_batches(data, plan.seq_length, config.eval.max_iters)
        calibration = calibration_windows(data, plan.seq_length, n).input_ids if n else None
        check_shared(data, fingerprint([*batches, *([] if calibration is None else [(calibration,)])]))
        return cls(data, batches, calibration, tasks)


@dataclass(frozen=True)
class RunningSearch:
    """A search with its journal open."""

    config: SearchConfig
    plan: SearchPlan
    text: ScoringText
    record: Record
    header: dict[str, Any]
    """Header of the journal"""
    selection: Selection | None
    """Created before the search, so that edits of its config file during the search have no effect"""

    def run(self, fabric: L.Fabric) -> SearchResult | None:
        """Search, select among the best candidates, and write the report.

        Returns:
            The search's result; None on all processes but the first.

        Raises:
            UserError: If no candidate could be scored.
            Interrupted: After Ctrl-C, with the result of the finished evaluations, which are kept.
        """
        stopped = False
        try:
            self._search(fabric)
        except KeyboardInterrupt:
            stopped = True
        if stopped and rank() > 0:
            raise SystemExit  # with code 0, since a failed rank would end rank 0, which still has to report
        if not stopped and not shutdown():
            return None
        found_any = bool(best_of(self.record.evaluations, self.config.measure.name))
        lines: list[str] = []
        if found_any and not stopped and self.selection is not None:
            lines = [self._select(self.selection)]
        result = self._report(lines) if found_any else None
        if stopped:
            logger.info(f"Stopped after {len(self.record.evaluations)} evaluations; continue with --resume true")
            raise Interrupted(result)
        if result is None:
            raise UserError(
                "no candidate could be scored, see the journal for why; try another precision, bin or limit"
            )
        return result

    def _search(self, fabric: L.Fabric) -> None:
        """Score the candidates. Only this call refers to the teacher, so that its memory is free for a selection."""
        config, searches, out_dir = self.config, self.plan.searches, self.config.out_dir
        race = config.racing_args
        # notes of an earlier search in this folder are about other candidates
        notes = on_rank_zero(lambda: RaceNotes.read(out_dir / NOTES)) if race and config.resume else []
        fitness = load_fitness(fabric, config, self.plan, self.text)
        seen = self.text.data, self.plan.seq_length, self.text.batches, self.text.calibration
        text, ranking, sharded = partial(text_to_measure, *seen), self.plan.ranking, config.is_sharded
        if self.header["settings"].get("simple_starts"):
            give_starts(searches, out_dir / STARTS, config.resume, fitness, text, ranking, sharded)
        rest: dict[str, Any] = {"parallel_map": each if sharded else parallel_map}
        order = partial(order_of_units, searches[0].space, fitness, text, ranking, sharded)
        take_measurements(searches, out_dir / MEASUREMENTS, self.header, fitness, order, config.seed, **rest)
        if race:
            rest |= {"racing": race, "notes": RaceNotes(out_dir / NOTES, notes)}
        loop = (RacingLoop if race else Loop)(
            searches, self.record, fitness, config.iterations, config.seed, self._save_best, **rest
        )
        loop.run()

    def _save(self, evaluation: Evaluation, path: Path) -> None:
        save_subnet(self.plan.teacher, self.config.checkpoint_dir, self.header["settings"], evaluation, path)

    def _save_best(self, search: Search, evaluation: Evaluation) -> None:
        if rank() == 0:
            self._save(evaluation, self._best_path(search))

    def _best_path(self, search: Search) -> Path:
        return self.config.out_dir / best_name(search, self.plan.searches)

    def _select(self, selection: Selection) -> str:
        """Replace the best candidates by the winners of short distillations, and return a table of these."""
        config, score, evaluations = self.config, self.config.measure.name, self.record.evaluations
        release_memory()  # the students are trained by other processes
        winners = selection.run(evaluations, score)
        for search in self.plan.searches:
            if winner := winners.get(str(search.space.bin)):
                best = self._best_path(search)
                shutil.copy(best, best.with_name(f"{best.stem}-by-score.yaml"))
                self._save(winner, best)
        return as_text(rung_table(read_results(config.out_dir), evaluations, score))

    def _report(self, lines: Sequence[str]) -> SearchResult:
        """Write the files of the report, and return the result, with further lines at the top of its summary."""
        out_dir, evaluations, searches = self.config.out_dir, self.record.evaluations, self.plan.searches
        save_fronts(out_dir, evaluations, self.header["settings"]["objectives"], self._save)
        lines = [*lines, write_report(out_dir), *save_surrogates(searches, evaluations, out_dir)]
        hint = try_next("extract", self.config.checkpoint_dir, self._best_path(searches[0]))
        lines.append(f"Sub-networks, journal and report are in {out_dir}. {hint}")
        return SearchResult(out_dir, self.config.checkpoint_dir, summary="\n".join(lines))


def convertible_note(teacher: Config) -> str:
    """Return a note that the space is restricted to students that transformers can represent."""
    architecture = FAMILIES[family_name(teacher)].architecture
    return (
        f"Students stay convertible to {architecture} of transformers, with n_embd a multiple of {teacher.head_size} "
        "(head_size) and at most n_embd / head_size heads; --search_space.convertible false lifts this restriction"
    )


def journal_header(
    checkpoint_dir: Path, teacher: Config, text: ScoringText, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the journal header: everything that the scores depend on."""
    return {
        "teacher": {
            "name": teacher.name,
            "config": config_fingerprint(teacher),
            "weights": weights_fingerprint(checkpoint_dir),
            "architecture": asdict(teacher),
        },
        "data": {
            "batches": len(text.batches),
            "tokens": sum(batch.n_tokens for batch in text.batches),
            "fingerprint": fingerprint(text.batches),
            "calibration": None if text.calibration is None else fingerprint([(text.calibration,)]),
            **({} if text.tasks is None else {"tasks": text.tasks.fingerprint}),
        },
        "settings": settings,
    }


def load_fitness(fabric: L.Fabric, config: SearchConfig, plan: SearchPlan, text: ScoringText) -> Fitness:
    """Load the teacher as a super-network, in the precision of the scoring, and return its fitness measure."""
    dtype = weights_dtype(fabric._precision.precision)
    if config.is_sharded:
        # the head is used after the forward pass, when FSDP would have resharded the root module
        model = load_sharded(config.checkpoint_dir, "SuperGPT", dtype, fabric.device, plan.seq_length, keep_root=True)
    else:
        model = load_model(config.checkpoint_dir, "SuperGPT", dtype=dtype, device=fabric.device)
        model.max_seq_length = plan.seq_length
    reset_attention(model, packing_of(text.data, config.checkpoint_dir))
    batches: Any = text.batches
    wanted: dict[str, Any] = {} if text.calibration is None else {"calibration": text.calibration}
    if config.measure.needs_importance:
        wanted["importance"] = plan.ranking
    if text.tasks is not None:
        wanted["tasks"] = text.tasks
    fitness = config.measure(model, batches, autocast=fabric.autocast, **wanted)
    if isinstance(fitness, Perplexity):
        fitness.n_bytes = n_text_bytes(config.checkpoint_dir, [batch.targets for batch in batches])
    return fitness
