"""`litgpt search`: find the sub-networks of a checkpoint that lie in a bin and predict best."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import lazy_instance
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir, init_out_dir
from tqdm import tqdm

from litgpt_whittle import registry
from litgpt_whittle.batches import Batch, calibration_windows, connect, fingerprint, sequence_length, validation_batches
from litgpt_whittle.bins import parse_bins
from litgpt_whittle.checkpoint import WEIGHTS, check_checkpoint, load_model, read_weights
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.errors import UserError
from litgpt_whittle.evaluations import best_of, prediction_tau
from litgpt_whittle.files import check_writable
from litgpt_whittle.fitness import Fitness
from litgpt_whittle.journal import JOURNAL, Evaluation, Journal, check_resumable, file_fingerprint
from litgpt_whittle.objectives import Measures, objective_measures
from litgpt_whittle.plugin import save_hyperparameters
from litgpt_whittle.processes import n_devices
from litgpt_whittle.ranking import Ranking
from litgpt_whittle.report import write_report
from litgpt_whittle.search_args import BatchArgs, BudgetArgs, SpaceArgs, SurrogateArgs
from litgpt_whittle.space import Space, SpaceName
from litgpt_whittle.strategies import Evolution, Strategy
from litgpt_whittle.strategies.surrogate_search import SurrogateSearch, with_surrogate
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.subnet import fingerprint as config_fingerprint
from litgpt_whittle.supergpt import is_tied

registry.load_all("litgpt_whittle.strategies")  # lets --strategy find them by their names

_DEFAULT_STRATEGY = lazy_instance(Evolution)  # shown with its settings in --help and --print_config


def setup(
    checkpoint_dir: Path,
    bin: str | int | float | list[str | int | float] | None = None,
    space: SpaceName = "coarse_layerwise",
    search_space: SpaceArgs = SpaceArgs(),
    order: Literal["given", "importance"] = "given",
    importance: Path | None = None,
    strategy: Strategy = _DEFAULT_STRATEGY,
    surrogate: SurrogateArgs = SurrogateArgs(),
    fitness: str = "perplexity",
    iterations: int = 1000,
    data: DataModule | None = None,
    train: BatchArgs = BatchArgs(),
    eval: BudgetArgs = BudgetArgs(),
    out_dir: Path = Path("out/search"),
    precision: Literal["bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true", None] = None,
    devices: int | str = 1,
    seed: int = 42,
    resume: bool = False,
) -> None:
    """Search a checkpoint for its best sub-networks of a given size.

    Arguments:
        checkpoint_dir: The teacher's checkpoint directory.
        bin: The parameters that a sub-network may have: a range (385M-426M), a target with a tolerance (410M±5%,
            also written 410M+-5%), or a target, which means ±5%. Several are separated by commas.
        space: Coarse spaces keep the first n of each dimension, fine ones any n; uniform ones make one choice for all
            layers, layerwise ones one for each. Which layers are kept is a choice in all of them.
        search_space: What may shrink, how far and in which steps.
        order: What the first n units of the coarse spaces are: the teacher's first ones, or its most important ones.
        importance: Which these are: the ``importance.pt`` that ``litgpt rank`` leaves behind.
        strategy: How to search, by its name, with its settings below it.
        surrogate: What predicts scores from those of other candidates, and what for; by default nothing.
        fitness: What candidates are scored by, by its name in ``litgpt_whittle.fitness``.
        iterations: Candidates to evaluate in each bin.
        data: What candidates are scored on: the validation part of any litgpt data module, or
            ``--data HFText --data.path PATH``.
        train: How candidates see the data.
        eval: How much of it they see.
        out_dir: Directory for the journal, the best sub-networks and the report.
        precision: The precision to score in. By default bf16-true on a GPU, 32-true elsewhere.
        devices: How many devices to use.
        seed: The random seed. The same seed gives the same search.
        resume: Continue the search in ``out_dir``; ``iterations`` may be raised, all else must be the same.
    """
    checkpoint_dir, out_dir = extend_checkpoint_dir(Path(checkpoint_dir)), init_out_dir(out_dir)
    if bin is None:
        raise UserError("bin must say how many parameters to search for; give one such as --bin 410M±5%")
    bins = parse_bins(bin)
    if iterations < 1:
        raise UserError(f"iterations must be at least 1, got {iterations}; raise it")
    if n_devices(devices) > 1:
        raise UserError(f"a search on several devices is not supported yet, got devices = {devices}; use 1")
    check_writable(out_dir)
    check_resumable(out_dir / JOURNAL, resume)
    teacher = check_checkpoint(checkpoint_dir)
    seq_length = sequence_length(teacher, train.max_seq_length)
    if data is None:
        raise UserError("data must be chosen; for example --data HFText --data.path PATH")
    ranking = _ranking(order, importance, checkpoint_dir, teacher, space, search_space)
    measure = registry.lookup("litgpt_whittle.fitness", fitness)
    tied = is_tied(read_weights(checkpoint_dir))
    strategy = Evolution() if strategy is _DEFAULT_STRATEGY else strategy
    units = None if ranking is None else ranking.order
    measures = objective_measures(strategy.objectives, measure.name, teacher, seq_length, tied)
    searcher, surrogate_settings = with_surrogate(strategy, surrogate, teacher, ranking, seed)
    searches = [
        Search.begin(Space(teacher, space, bin, tied, search_space, units), searcher, measure.name, seed, measures)
        for bin in bins
    ]
    precision = precision or ("bf16-true" if torch.cuda.is_available() else "32-true")
    fabric = L.Fabric(devices=1, precision=precision)
    L.seed_everything(seed, verbose=False)
    connect(data, checkpoint_dir, train.micro_batch_size, seq_length)
    batches = validation_batches(data, seq_length, eval.max_iters)
    n_calibration = getattr(measure, "n_calibration", 0)
    calibration = calibration_windows(data, seq_length, n_calibration) if n_calibration else None
    out_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        "space": space,
        "search_space": asdict(search_space),
        "order": order,
        "importance": None if ranking is None else ranking.fingerprint,
        "bin": [str(bin) for bin in bins],
        "strategy": type(strategy).__name__,
        "strategy_settings": strategy.settings,
        **({"surrogate": surrogate_settings} if surrogate_settings else {}),
        "fitness": fitness,
        "score": measure.name,
        "seed": seed,
        "precision": precision,
        "micro_batch_size": train.micro_batch_size,
        "max_seq_length": seq_length,
        "max_iters": eval.max_iters,
    }
    header = {
        "teacher": {
            "name": teacher.name,
            "config": config_fingerprint(teacher),
            "weights": file_fingerprint(checkpoint_dir / WEIGHTS),
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
    with Journal(out_dir / JOURNAL, header, resume) as journal:
        save_hyperparameters(setup, out_dir)
        fitness = load_fitness(fabric, checkpoint_dir, measure, batches, seq_length, calibration)
        main(fitness, checkpoint_dir, searches, journal, iterations, out_dir, settings)


def _ranking(
    order: str, path: Path | None, checkpoint_dir: Path, teacher: Config, space: SpaceName, search_space: SpaceArgs
) -> Ranking | None:
    """The teacher's ranking, where the order of importance is asked for."""
    if order not in ("given", "importance"):
        raise UserError(f"order must be given or importance, got {order!r}")
    if order == "given":
        if path is not None:
            raise UserError("importance is read with --order importance only; add that or leave it out")
        return None
    if path is None:
        raise UserError("--order importance needs --importance, the importance.pt that 'litgpt rank' leaves behind")
    if space.startswith("fine") and search_space.layers != "best":
        raise UserError(
            f"order importance says which units coarse spaces keep, got space = {space}; choose a coarse one, or "
            "order its layers with --search_space.layers best"
        )
    ranking = Ranking.load(Path(path), teacher)
    weights = file_fingerprint(checkpoint_dir / WEIGHTS)
    if (ranked := ranking.provenance.get("weights", weights)) != weights:
        raise UserError(f"{str(path)!r} ranks other weights ({ranked}, not {weights}); rank this checkpoint")
    return ranking


def main(
    fitness: Fitness,
    checkpoint_dir: Path,
    searches: list[Search],
    journal: Journal,
    iterations: int,
    out_dir: Path,
    settings: dict[str, Any],
) -> None:
    """Scores what the strategies ask for, and reports."""
    teacher = fitness.model.config

    def save_best(search: Search, evaluation: Evaluation) -> None:
        provenance = {
            "checkpoint_dir": str(checkpoint_dir.absolute()),
            "bin": str(search.space.bin),
            "n_params": evaluation.n_params,
            **evaluation.scores,
            "tokens": evaluation.tokens,
            "evaluation": evaluation.index,
            **{name: settings[name] for name in ("space", "order", "strategy", "seed", "precision", "max_seq_length")},
        }
        SubNet.from_dict(teacher, evaluation.subnet).save(out_dir / best_name(search, searches), **provenance)

    stopped = False
    try:
        run(searches, journal, fitness, iterations, settings["seed"], save_best)
    except KeyboardInterrupt:
        stopped = True
    found_any = bool(best_of(journal.evaluations, fitness.name))
    if found_any:
        print(write_report(out_dir))
        report_surrogates(searches, journal.evaluations, out_dir)
        best = out_dir / best_name(searches[0], searches)
        print(f"Sub-networks, journal and report are in {out_dir}. Try: litgpt extract {checkpoint_dir} {best}")
    if stopped:
        print(f"Stopped after {len(journal.evaluations)} evaluations; continue with --resume true")
        raise SystemExit(130)
    if not found_any:
        raise UserError("no candidate could be scored, see the journal for why; try another precision or bin")


def run(
    searches: list[Search],
    journal: Journal,
    fitness: Callable[[SubNet], dict[str, float]],
    iterations: int,
    seed: int,
    save_best: Callable[[Search, Evaluation], None],
) -> None:
    """Evaluates candidates, the bins in turn, first from the journal as far as it goes.

    Args:
        searches: One per bin.
        journal: Gets every evaluation as it ends; those that it has are told to the strategies instead of repeated.
        fitness: Scores a sub-network.
        iterations: Evaluations per bin.
        seed: For the journal.
        save_best: Called with every new best of a bin.
    """
    known = list(journal.evaluations)
    index = 0
    with tqdm(total=max(iterations * len(searches), len(known)), unit="candidate", dynamic_ncols=True) as bar:
        for search in _in_turn(searches, iterations):
            candidate = search.next_candidate()
            if candidate is None:
                continue
            if index < len(known):
                evaluation = _replay(known[index], search, candidate)
            else:
                evaluation = evaluate(search, candidate, fitness, index, seed)
                journal.append(evaluation)
            index += 1
            if search.tell(candidate, evaluation):
                save_best(search, evaluation)
            bar.update()
            bar.set_postfix_str(", ".join(search.standing for search in searches), refresh=False)
    for search in searches:
        if search.strategy.exhausted:
            print(f"The bin {search.space.bin} has no further sub-networks: {search.n_told} evaluated")


def _in_turn(searches: list[Search], iterations: int) -> Iterator[Search]:
    for _ in range(iterations):
        yield from searches


@dataclass
class Search:
    """The search of one bin."""

    space: Space
    strategy: Strategy
    score: str
    """Which of a candidate's scores counts"""
    measures: Measures = field(default_factory=dict)
    """What else to measure of a candidate; journalled among its scores"""
    best: Evaluation | None = None
    n_told: int = 0

    @classmethod
    def begin(
        cls, space: Space, strategy: Strategy, score: str, seed: int, measures: Measures = MappingProxyType({})
    ) -> Search:
        """A search of its own, whatever other bins are searched beside it."""
        strategy = copy.deepcopy(strategy)
        strategy.start(space, seed)
        return cls(space, strategy, score, measures)

    def next_candidate(self) -> SubNet | None:
        """What to evaluate next; None when there is nothing left."""
        return next(iter(self.strategy.ask(1)), None)

    def tell(self, candidate: SubNet, evaluation: Evaluation) -> bool:
        """Takes an evaluation; says whether it is the best so far."""
        score = evaluation.score(self.score)
        self.strategy.tell(candidate, score, evaluation.measures)
        self.n_told += 1
        is_best = score < (math.inf if self.best is None else self.best.score(self.score))
        if is_best:
            self.best = evaluation
        return is_best

    @property
    def standing(self) -> str:
        """The best so far, for the progress bar."""
        return f"best {self.best.score(self.score):.4g}" if self.best is not None else "none yet"


def evaluate(
    search: Search, candidate: SubNet, fitness: Callable[[SubNet], dict[str, float]], index: int, seed: int
) -> Evaluation:
    """Scores a candidate; one whose loss is not finite or that runs out of memory counts as failed."""
    started, error, scores = time.perf_counter(), None, {}
    try:
        scores = fitness(candidate) | {name: measure(candidate) for name, measure in search.measures.items()}
        scores |= search.strategy.expects(candidate)
    except torch.OutOfMemoryError:
        error = "out of memory"
    if not all(math.isfinite(score) for score in scores.values()):
        error = "its loss is not finite"
    return Evaluation(
        index=index,
        bin=str(search.space.bin),
        subnet=candidate.to_dict(),
        n_params=search.space.n_params(candidate),
        scores={name: score if math.isfinite(score) else None for name, score in scores.items()},
        seed=seed,
        batches=len(fitness.batches),
        tokens=fitness.n_tokens,
        seconds=round(time.perf_counter() - started, 4),
        error=error,
    )


def _replay(evaluation: Evaluation, search: Search, candidate: SubNet) -> Evaluation:
    if evaluation.bin != str(search.space.bin) or evaluation.subnet != candidate.to_dict():
        raise UserError(
            f"evaluation {evaluation.index} of the journal is not what this search would have tried; it was written by "
            "another version, so begin in another out_dir"
        )
    return evaluation


def load_fitness(
    fabric: L.Fabric,
    checkpoint_dir: Path,
    measure: type[Fitness],
    batches: list[Batch],
    seq_length: int,
    calibration: torch.Tensor | None,
) -> Fitness:
    """Loads the teacher as a super-network, in the precision that candidates are scored in."""
    dtypes = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
    dtype = dtypes.get(fabric._precision.precision, torch.float32)
    model = load_model(checkpoint_dir, "SuperGPT", dtype=dtype, device=fabric.device)
    model.max_seq_length = seq_length
    wanted = {} if calibration is None else {"calibration": calibration}
    return measure(model, batches, autocast=fabric.autocast, **wanted)


def report_surrogates(searches: list[Search], evaluations: list[Evaluation], out_dir: Path) -> None:
    """Says how well each bin's surrogate predicted what was not measured yet, and writes those that are worth it."""
    for search in searches:
        if isinstance(search.strategy, SurrogateSearch):
            bin = str(search.space.bin)
            tau, n = prediction_tau([e for e in evaluations if e.bin == bin], search.score)
            print(f"The surrogate of {bin} predicted {n} candidates before they were measured: Kendall's τ {tau:.2f}")
            search.strategy.save(out_dir / ("surrogate" if len(searches) == 1 else f"surrogate-{bin}"))


def best_name(search: Search, searches: list[Search]) -> str:
    """Where a bin's best sub-network goes."""
    return "best.yaml" if len(searches) == 1 else f"best-{search.space.bin}.yaml"
