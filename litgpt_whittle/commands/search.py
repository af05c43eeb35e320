"""`litgpt search`: find the best sub-networks of a checkpoint within each bin of parameter counts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from jsonargparse import Namespace, lazy_instance
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir, init_out_dir

from litgpt_whittle import registry
from litgpt_whittle.batches import (
    Batch,
    BatchArgs,
    BudgetArgs,
    calibration_windows,
    check_seed,
    check_shared,
    fingerprint,
    sequence_length,
    validation_batches,
)
from litgpt_whittle.checkpoint import check_checkpoint, load_model, read_weights, weights_fingerprint
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.data.loading import check_data, connect
from litgpt_whittle.errors import UserError
from litgpt_whittle.evaluations import best_of
from litgpt_whittle.families import (
    FAMILIES,
    family_name,
)
from litgpt_whittle.files import check_writable
from litgpt_whittle.fitness.perplexity import Fitness
from litgpt_whittle.hints import try_next
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.journal import (
    JOURNAL,
    Evaluation,
    check_resumable,
    open_record,
)
from litgpt_whittle.metrics import MeasureArgs
from litgpt_whittle.plugin import save_hyperparameters
from litgpt_whittle.processes import (
    each,
    is_first_started,
    launch,
    n_devices,
    on_rank_zero,
    own_device,
    parallel_map,
    rank,
    release_memory,
    shutdown,
)
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.reports.fronts import save_fronts
from litgpt_whittle.reports.report import as_text, write_report
from litgpt_whittle.searching.args import (
    RacingArgs,
    SelectionArgs,
)
from litgpt_whittle.searching.loop import Loop, Record, Search
from litgpt_whittle.searching.measuring import MEASUREMENTS, measurement_names, take_measurements
from litgpt_whittle.searching.objectives import objective_measures, objective_names
from litgpt_whittle.searching.outcome import best_name, report_surrogates, save_subnet
from litgpt_whittle.searching.racing_loop import NOTES, RaceNotes, RacingLoop, check_can_race
from litgpt_whittle.searching.selection import Selection, parse_rungs, read_results, rung_table
from litgpt_whittle.searching.starting import STARTS, give_starts, has_no_starts, order_of_units, text_to_measure
from litgpt_whittle.spaces.args import (
    LimitArgs,
    SpaceArgs,
)
from litgpt_whittle.spaces.bins import parse_bins
from litgpt_whittle.spaces.limits import Limits
from litgpt_whittle.spaces.sizes import decided
from litgpt_whittle.spaces.space import Space, SpaceName
from litgpt_whittle.strategies import Evolution, Strategy
from litgpt_whittle.strategies.surrogate_search import with_surrogate
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.subnet import fingerprint as config_fingerprint
from litgpt_whittle.supergpt import is_tied
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.training.sharding import load_sharded

registry.load_all("litgpt_whittle.strategies")  # lets --strategy find them by name

Save = Callable[[Evaluation, Path], None]
"""Writes an evaluation's sub-network to a path"""

_DEFAULT_STRATEGY = lazy_instance(Evolution)  # shown with its settings in --help and --print_config


def setup(
    checkpoint_dir: Path,
    bin: str | int | float | list[str | int | float] | None = None,
    space: SpaceName = "fine_uniform",
    search_space: SpaceArgs = SpaceArgs(),
    limit: LimitArgs = LimitArgs(),
    order: Literal["given", "importance"] = "given",
    importance: Path | None = None,
    strategy: Strategy | str = _DEFAULT_STRATEGY,
    surrogate: SurrogateArgs = SurrogateArgs(),
    fitness: str = "repaired_perplexity",
    iterations: int = 1000,
    simple_starts: bool = True,
    data: DataModule | None = None,
    train: BatchArgs = BatchArgs(),
    eval: BudgetArgs = BudgetArgs(),
    out_dir: Path = Path("out/search"),
    precision: Literal["bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true", None] = None,
    racing: bool | RacingArgs = False,
    selection: SelectionArgs = SelectionArgs(),
    devices: int | str = 1,
    num_nodes: int = 1,
    teacher_placement: Literal["replicated", "sharded"] = "replicated",
    seed: int = 42,
    resume: bool = False,
) -> None:
    """Search a checkpoint for its best sub-networks of a given size.

    Arguments:
        checkpoint_dir: The teacher's checkpoint directory.
        bin: Parameter count of the sub-networks: a range (385M-426M), a target with a tolerance (410M±5%, also written
            410M+-5%), or a target, which means ±5%. Several bins are separated by commas. With a limit, it may be left
            out to allow any parameter count.
        space: Coarse spaces keep the first n units of each dimension, fine ones any n; uniform ones make one choice for
            all layers, layerwise ones one per layer. All of them also choose the kept layers.
        search_space: Dimensions that may shrink, their bounds and steps.
        limit: Bounds on a sub-network's cost: a maximum (``--limit.flops 800M``), or a range (600M-800M).
        order: Order of units in coarse spaces, which keep the first n: as in the teacher, or by importance.
        importance: The ``importance.pt`` of ``litgpt rank``. Some fitness measures need it too, and the simple starts
            of fine spaces choose their units and layers by it.
        strategy: Search strategy, by its name in ``litgpt_whittle.strategies``, with its settings below it.
        surrogate: Model that predicts scores from those of other candidates, and its use; by default none.
        fitness: Measure that scores candidates, by its name in ``litgpt_whittle.fitness``. By default the perplexity
            after a repair such as ``litgpt extract --repair`` makes; ``perplexity`` is that of the plain cut, which
            takes less memory and time.
        iterations: Candidates to evaluate in each bin.
        simple_starts: Begin with simple cuts that fit the bin: fewer neurons, fewer layers, fewer channels, and
            mixtures of these. They count as evaluations, and the strategy learns from their scores. Fine spaces keep
            the most important units, by ``importance`` or by a quick measurement on the data.
        data: Data to score candidates on: the validation split of any litgpt data module, or
            ``--data HFText --data.path PATH``; repairs are fitted to its training split. Some fitness measures need
            none.
        train: Micro batch size and sequence length of the scoring.
        eval: Number of validation batches per evaluation.
        out_dir: Directory for the journal, the best sub-networks and the report.
        precision: The precision to score in. By default bf16-true on a GPU, 32-true elsewhere.
        racing: Score most candidates on a part of the data and only the best of them on all of it: ``true``, or
            settings such as ``--racing.alpha 0.01``.
        selection: Final selection among the best candidates: by their score, or by short distillations in rungs.
        devices: Devices that share the scoring: GPUs, or processes on a CPU's cores. The search does not depend on
            their number.
        num_nodes: Number of machines, with ``devices`` devices each.
        teacher_placement: ``replicated``: each device holds the teacher and scores its own candidates. ``sharded``:
            the devices hold a part of it each (FSDP2) and score every candidate together.
        seed: The random seed. The same seed gives the same search.
        resume: Continue the search in ``out_dir``; ``iterations`` may be raised, all other settings must be the same.
    """
    checkpoint_dir, out_dir = extend_checkpoint_dir(Path(checkpoint_dir)), init_out_dir(out_dir)
    ranking = check(Namespace(**locals()))
    bins = [None] if bin is None else parse_bins(bin)
    n, sharded = n_devices(devices), teacher_placement == "sharded"
    check_writable(out_dir)
    check_resumable(out_dir / JOURNAL, resume)
    teacher = check_checkpoint(checkpoint_dir)
    seq_length = sequence_length(teacher, train.max_seq_length)
    measure = registry.lookup("litgpt_whittle.fitness", fitness)
    reads_data, needs_importance = (getattr(measure, *asked) for asked in _ASKED_OF_FITNESS)
    tied = is_tied(read_weights(checkpoint_dir))
    strategy = made_strategy(strategy)
    units = cast(Ranking, ranking).order if order == "importance" else None
    limits = Limits(limit.ranges(), teacher, MeasureArgs(seq_length, tied=tied)) if limit.ranges() else Limits()
    objectives = [*strategy.objectives, *limits.ranges]
    measures = objective_measures(objectives, measure.name, teacher, seq_length, tied)
    searcher, surrogate_settings = with_surrogate(strategy, surrogate, teacher, ranking, seed)
    chosen, search_space = search_space, decided(search_space, teacher)
    spaces = [Space(teacher, space, bin, tied, search_space, units, limits) for bin in bins]
    searches = [Search.begin(each, searcher, measure.name, seed, measures) for each in spaces]
    measurement_names(searches)  # a strategy rejects a bin before anything is loaded
    race = RacingArgs() if racing is True else racing or None
    scored_in = precision or _default_precision()
    fabric = launch(n, scored_in, num_nodes)
    L.seed_everything(seed, verbose=False)
    if search_space != chosen and rank() == 0:
        print(_convertible_note(teacher), file=sys.stderr)
    batches = []
    if reads_data:
        validation_only = not getattr(measure, "n_calibration", 0)
        connect(data, checkpoint_dir, train.micro_batch_size, seq_length, validation_only)
        batches = validation_batches(data, seq_length, eval.max_iters)
    n_calibration = getattr(measure, "n_calibration", 0)
    wanted: dict[str, Any] = (
        {"calibration": calibration_windows(data, seq_length, n_calibration)} if n_calibration else {}
    )
    check_shared(data, fingerprint([*batches, *((windows,) for windows in wanted.values())]))
    wanted |= {"importance": ranking} if needs_importance else {}
    out_dir.mkdir(parents=True, exist_ok=True)
    simple_starts = simple_starts and not (resume and has_no_starts(out_dir / JOURNAL))
    settings = {
        "space": space,
        # older journals lack `convertible`, and their spaces did not have it
        "search_space": {k: v for k, v in asdict(search_space).items() if k != "convertible" or v},
        "order": order,
        "importance": ranking and (ranking.scores_fingerprint if needs_importance else ranking.fingerprint),
        "bin": [str(search.space.bin) for search in searches],
        "limits": limits.settings,
        "strategy": type(strategy).__name__,
        "strategy_settings": strategy.settings,
        **({"surrogate": surrogate_settings} if surrogate_settings else {}),
        # absent if false, as in journals older than this option
        **({"simple_starts": True} if simple_starts else {}),
        "fitness": fitness,
        "score": measure.name,
        "racing": asdict(race) if race else None,
        "objectives": objective_names(strategy.objectives, measure.name),
        "seed": seed,
        "precision": scored_in,
        "micro_batch_size": train.micro_batch_size,
        "max_seq_length": seq_length,
        "max_iters": eval.max_iters,
    }
    header = _header(checkpoint_dir, teacher, batches, wanted.get("calibration"), settings)
    with open_record(out_dir / JOURNAL, header, resume) as record:
        # notes of an earlier search in this folder are about other candidates
        notes = on_rank_zero(lambda: RaceNotes.read(out_dir / NOTES)) if race and resume else []
        if rank() == 0:
            save_hyperparameters(setup, out_dir)
        save = partial(save_subnet, teacher, checkpoint_dir, settings)

        def save_best(search: Search, evaluation: Evaluation) -> None:
            if rank() == 0:
                save(evaluation, out_dir / best_name(search, searches))

        def run() -> None:
            # only this call refers to the teacher, so that a selection has its memory
            fitness = load_fitness(fabric, checkpoint_dir, measure, batches, seq_length, wanted, sharded)
            seen = data if reads_data else None, seq_length, batches, wanted.get("calibration")
            text = partial(text_to_measure, *seen)
            if simple_starts:
                give_starts(searches, out_dir / STARTS, resume, fitness, text, ranking, sharded)
            rest: dict[str, Any] = {"parallel_map": each if sharded else parallel_map}
            order = partial(order_of_units, spaces[0], fitness, text, ranking, sharded)
            take_measurements(searches, out_dir / MEASUREMENTS, header, fitness, order, seed, **rest)
            if race:
                rest |= {"racing": race, "notes": RaceNotes(out_dir / NOTES, notes)}
            (RacingLoop if race else Loop)(searches, record, fitness, iterations, seed, save_best, **rest).run()

        choose = Selection(checkpoint_dir, out_dir, selection, n) if selection.rungs else None
        main(run, searches, record, measure.name, save, choose, checkpoint_dir, out_dir, settings["objectives"])


def _convertible_note(teacher: Config) -> str:
    architecture = FAMILIES[family_name(teacher)].architecture
    return (
        f"Students stay convertible to {architecture} of transformers, with n_embd a multiple of {teacher.head_size} "
        "(head_size) and no more heads than fit into it; --search_space.convertible false lifts that"
    )


def _header(
    checkpoint_dir: Path,
    teacher: Config,
    batches: list[Batch],
    calibration: torch.Tensor | None,
    settings: dict[str, Any],
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
            "batches": len(batches),
            "tokens": sum(batch.n_tokens for batch in batches),
            "fingerprint": fingerprint(batches),
            "calibration": None if calibration is None else fingerprint([(calibration,)]),
        },
        "settings": settings,
    }


def check(args: Namespace, to_come: Collection[Path] = ()) -> Ranking | None:
    """Run the checks that take no time; `litgpt whittle` runs them before its first stage.

    Args:
        args: The command's arguments, by name.
        to_come: Files that an earlier stage will write.

    Returns:
        The teacher's ranking; None if it is not needed, or still to be written.

    Raises:
        UserError: For the first invalid setting.
    """
    if args.bin is None and not args.limit.ranges():
        raise UserError("bin must say how many parameters to search for; give one such as --bin 410M±5%, or a limit")
    if args.bin is not None:
        parse_bins(args.bin)
    if args.iterations < 1:
        raise UserError(f"iterations must be at least 1, got {args.iterations}; raise it")
    check_seed(args.seed)
    n = n_devices(args.devices)
    teacher = check_checkpoint(args.checkpoint_dir)
    sequence_length(teacher, args.train.max_seq_length)
    measure = registry.lookup("litgpt_whittle.fitness", args.fitness)
    reads_data, needs_importance = (getattr(measure, *asked) for asked in _ASKED_OF_FITNESS)
    if args.data is None and reads_data:
        raise UserError("data must be chosen; for example --data HFText --data.path PATH")
    ranking = None
    if _needs_ranking(args, needs_importance) and args.importance not in to_come:
        ranking = _load_ranking(args.importance, args.checkpoint_dir, teacher)
    strategy = made_strategy(args.strategy)
    if args.racing:
        check_can_race(measure, args.fitness, strategy)
    if args.teacher_placement == "sharded":
        _check_can_shard(measure, args.fitness, n * args.num_nodes)
    parse_rungs(args.selection, to_come)
    read_weights(args.checkpoint_dir)  # damaged weights fail before the data is read
    check_data(args.data if reads_data else None, args.checkpoint_dir, teacher.padded_vocab_size)
    if hasattr(measure, "check") and is_first_started():  # a GPU's free memory can be read from a context there only
        itemsize = _DTYPES.get(args.precision or _default_precision(), torch.float32).itemsize
        measure.check(teacher, own_device(), n_params(teacher, SubNet.full(teacher)) * itemsize)
    return ranking


_ASKED_OF_FITNESS = (("reads_data", True), ("needs_importance", False))

_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


def _default_precision() -> str:
    return "bf16-true" if torch.cuda.is_available() else "32-true"


def made_strategy(strategy: Strategy | str) -> Strategy:
    """Return the given strategy; for a name, the strategy of that name with its default settings."""
    if isinstance(strategy, str):  # from Python, or a name that is no class known to the command line
        return registry.lookup("litgpt_whittle.strategies", strategy)()
    return Evolution() if strategy is _DEFAULT_STRATEGY else strategy


def _check_can_shard(measure: type[Fitness], name: str, n: int) -> None:
    if n == 1:
        raise UserError("teacher_placement sharded spreads the teacher over devices, got 1; raise --devices")
    if not getattr(measure, "can_shard", False):
        raise UserError(
            f"fitness {name!r} needs the whole teacher on each device; use --teacher_placement replicated, or "
            "--fitness perplexity"
        )


def _needs_ranking(args: Namespace, by_fitness: bool) -> bool:
    """Return whether the order, the fitness or the simple starts use the teacher's ranking.

    Raises:
        UserError: If the ranking is missing, or given without use.
    """
    order, path = args.order, args.importance
    if order not in ("given", "importance"):
        raise UserError(f"order must be given or importance, got {order!r}")
    if order == "given" and not by_fitness:
        for_starts = args.simple_starts and args.space.startswith("fine")
        if path is not None and not for_starts:
            raise UserError(
                "importance is read with --order importance only, by a fitness that needs it, or for the simple starts "
                "of fine spaces; choose one or leave it"
            )
        return path is not None
    if path is None:
        who = "--order importance" if order == "importance" else f"--fitness {args.fitness}"
        raise UserError(f"{who} needs --importance, the importance.pt that 'litgpt rank' writes")
    if order == "importance" and args.space.startswith("fine") and args.search_space.layers != "best":
        raise UserError(
            f"order importance selects the units that coarse spaces keep, got space = {args.space}; choose a coarse "
            "one, or order its layers with --search_space.layers best"
        )
    return True


def _load_ranking(path: Path, checkpoint_dir: Path, teacher: Config) -> Ranking:
    ranking = Ranking.load(Path(path), teacher)
    weights = weights_fingerprint(checkpoint_dir)
    if (ranked := ranking.provenance.get("weights", weights)) != weights:
        raise UserError(f"{str(path)!r} ranks other weights ({ranked}, not {weights}); rank this checkpoint")
    return ranking


def main(
    run: Callable[[], None],
    searches: list[Search],
    record: Record,
    score: str,
    save: Save,
    selection: Selection | None,
    checkpoint_dir: Path,
    out_dir: Path,
    objectives: list[str],
) -> None:
    """Run the search, select among the best candidates, and report."""
    stopped = False
    try:
        run()
    except KeyboardInterrupt:
        stopped = True
    if stopped and rank() > 0:
        raise SystemExit  # with code 0, since a failed rank would end rank 0, which still has to report
    if not stopped and not shutdown():
        return
    evaluations = record.evaluations
    found_any = bool(best_of(evaluations, score))
    if found_any and selection is not None and not stopped:
        release_memory()  # the students are trained by other processes
        winners = selection.run(evaluations, score)
        for search in searches:
            if winner := winners.get(str(search.space.bin)):
                best = out_dir / best_name(search, searches)
                shutil.copy(best, best.with_name(f"{best.stem}-by-score.yaml"))
                save(winner, best)
        print(as_text(rung_table(read_results(out_dir), evaluations, score)))
    if found_any:
        save_fronts(out_dir, evaluations, objectives, save)
        print(write_report(out_dir))
        report_surrogates(searches, evaluations, out_dir)
        best = out_dir / best_name(searches[0], searches)
        print(f"Sub-networks, journal and report are in {out_dir}. {try_next('extract', checkpoint_dir, best)}")
    if stopped:
        print(f"Stopped after {len(evaluations)} evaluations; continue with --resume true")
        raise SystemExit(130)
    if not found_any:
        raise UserError("no candidate could be scored, see the journal for why; try another precision, bin or limit")


def load_fitness(
    fabric: L.Fabric,
    checkpoint_dir: Path,
    measure: type[Fitness],
    batches: list[Batch],
    seq_length: int,
    wanted: dict[str, Any],
    sharded: bool = False,
) -> Fitness:
    """Load the teacher as a super-network, in the precision of the scoring, and return its fitness measure.

    `wanted` holds the further arguments of `measure`, after the teacher and the batches.
    """
    dtype = _DTYPES.get(fabric._precision.precision, torch.float32)
    if sharded:
        # the head is used after the forward pass, when FSDP would have resharded the root module
        model = load_sharded(checkpoint_dir, "SuperGPT", dtype, fabric.device, seq_length, keep_root=True)
    else:
        model = load_model(checkpoint_dir, "SuperGPT", dtype=dtype, device=fabric.device)
        model.max_seq_length = seq_length
    return measure(model, batches, autocast=fabric.autocast, **wanted)
