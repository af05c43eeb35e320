"""`litgpt search`: find the best sub-networks of a checkpoint within each bin of parameter counts."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
from jsonargparse import lazy_instance
from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir, init_out_dir

from litgpt_whittle import registry
from litgpt_whittle.batches import (
    BatchArgs,
    BudgetArgs,
    sequence_length,
)
from litgpt_whittle.checkpoint import check_checkpoint, read_weights, weights_fingerprint
from litgpt_whittle.command_config import CommandConfig, as_command
from litgpt_whittle.commands.search_run import (
    RunningSearch,
    ScoringText,
    SearchPlan,
    convertible_note,
    journal_header,
)
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.data.loading import check_data
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_writable
from litgpt_whittle.fitness import Fitness
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.fitness.repaired import Repaired
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.journal import (
    JOURNAL,
    check_resumable,
    open_record,
)
from litgpt_whittle.plugin import save_hyperparameters
from litgpt_whittle.processes import (
    is_first_started,
    launch,
    n_devices,
    own_device,
    rank,
)
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.results import SearchResult
from litgpt_whittle.searching.args import (
    RacingArgs,
    SelectionArgs,
)
from litgpt_whittle.searching.racing_loop import check_can_race
from litgpt_whittle.searching.selection import Selection, parse_rungs
from litgpt_whittle.searching.starting import has_no_starts
from litgpt_whittle.setting_checks import changed, check_seed
from litgpt_whittle.settings import describe
from litgpt_whittle.spaces.args import (
    LimitArgs,
    SpaceArgs,
)
from litgpt_whittle.spaces.bins import Bin, parse_bins
from litgpt_whittle.spaces.space import SpaceName
from litgpt_whittle.strategies import Evolution, Strategy
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.tasks import SearchTaskArgs, TaskSet
from litgpt_whittle.tasks.harness import read_tasks
from litgpt_whittle.tensors import default_precision, weights_dtype

logger = logging.getLogger(__name__)

registry.load_all("litgpt_whittle.strategies")  # lets --strategy find them by name

_DEFAULT_STRATEGY = lazy_instance(Evolution)  # shown with its settings in --help and --print_config


@dataclass
class SearchConfig(CommandConfig):
    """Search a checkpoint for its best sub-networks of a given size."""

    FREE: ClassVar[frozenset[str]] = frozenset(
        ("out_dir", "resume", "devices", "num_nodes", "teacher_placement", "data.init_args.num_workers")
    )

    checkpoint_dir: Path
    """The teacher's checkpoint directory."""
    bin: str | int | float | list[str | int | float] | None = None
    """Parameter count of the sub-networks: a range (385M-426M), a target with a tolerance (410M±5%, also written
    410M+-5%), or a target, which means ±5%. Several bins are separated by commas. It may be left out if there is a
    limit; any parameter count is then allowed."""
    space: SpaceName = "fine_uniform"
    """Coarse spaces keep the first n units of each dimension, fine spaces any n units. Uniform spaces make one choice
    for all layers, layerwise spaces one per layer. All spaces also choose the kept layers."""
    search_space: SpaceArgs = field(default_factory=SpaceArgs)
    """Dimensions that may shrink, their bounds and steps."""
    limit: LimitArgs = field(default_factory=LimitArgs)
    """Bounds on a sub-network's cost: a maximum (``--limit.flops 800M``), or a range (600M-800M)."""
    order: Literal["given", "importance"] = "given"
    """Order of units in coarse spaces, which keep the first n: as in the teacher, or by importance."""
    importance: Path | None = None
    """The ``importance.pt`` of ``litgpt rank``, for ``order: importance`` and for fitness measures that need it. In
    fine spaces, simple starts choose their units and layers by it."""
    strategy: Strategy | str = _DEFAULT_STRATEGY
    """Search strategy, by its name in ``litgpt_whittle.strategies``, with its settings below it."""
    surrogate: SurrogateArgs = field(default_factory=SurrogateArgs)
    """Model that predicts a candidate's score from the scores of others, and how to use it; by default none."""
    fitness: str = "repaired_perplexity"
    """Measure that scores candidates, by its name in ``litgpt_whittle.fitness``. By default the perplexity after a
    repair like that of ``litgpt extract --repair``; ``perplexity`` skips the repair, which takes less memory and
    time. ``tasks`` and ``repaired_tasks`` score the answers to ``--tasks.names``."""
    tasks: SearchTaskArgs = field(default_factory=SearchTaskArgs)
    """Tasks of lm-eval to score candidates on."""
    iterations: int = 1000
    """Candidates to evaluate in each bin."""
    simple_starts: bool = True
    """Begin with simple sub-networks in the bin: fewer neurons, fewer layers, fewer channels, and mixtures of these.
    They count as evaluations, and the strategy learns from their scores. Fine spaces keep the most important units, by
    ``importance`` or by a quick measurement on the data."""
    data: DataModule | None = None
    """Data to score candidates on: the validation split of any litgpt data module, or
    ``--data HFText --data.path PATH``; repairs are fitted to its training split. Some fitness measures need none."""
    train: BatchArgs = field(default_factory=BatchArgs)
    """Micro batch size and sequence length of the scoring."""
    eval: BudgetArgs = field(default_factory=BudgetArgs)
    """Number of validation batches per evaluation."""
    out_dir: Path = Path("out/search")
    """Directory for the journal, the best sub-networks and the report."""
    precision: Literal["bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true", None] = None
    """The precision to score in. By default bf16-true on a GPU, 32-true elsewhere."""
    racing: bool | RacingArgs = False
    """Score most candidates on a part of the data and only the best of them on all of it: ``true``, or settings such as
    ``--racing.alpha 0.01``."""
    selection: SelectionArgs = field(default_factory=SelectionArgs)
    """Final selection among the best candidates: by their score, or by short distillations in rungs."""
    devices: int | str = 1
    """Devices that share the scoring: GPUs, or processes on a CPU's cores. The result does not depend on their
    number."""
    num_nodes: int = 1
    """Number of machines, with ``devices`` devices each."""
    teacher_placement: Literal["replicated", "sharded"] = "replicated"
    """``replicated``: each device holds the teacher and scores its own candidates. ``sharded``: each device holds a
    part of it (FSDP2), and all score every candidate together."""
    seed: int = 42
    """The random seed. The same seed gives the same search."""
    resume: bool = False
    """Continue the search in ``out_dir``; ``iterations`` may be raised, all other settings must be the same."""

    def __post_init__(self) -> None:
        self.checkpoint_dir, self.out_dir = extend_checkpoint_dir(Path(self.checkpoint_dir)), init_out_dir(self.out_dir)

    def validate(self, to_come: Collection[Path] = ()) -> None:
        """Check all that can be checked before anything is loaded.

        Args:
            to_come: Files that an earlier command will write.

        Raises:
            UserError: For the first invalid argument.
        """
        if self.bin is None and not self.limit.ranges():
            raise UserError("the target size is missing; set a bin such as --bin 410M±5%, or a limit")
        if self.iterations < 1:
            raise UserError(f"iterations must be at least 1, got {self.iterations}; raise it")
        check_seed(self.seed)
        self._check_order()
        measure, strategy = self.measure, self.made_strategy
        _ = self.bins  # raises for invalid ones
        if self.data is None and measure.needs_data():
            raise UserError("data must be chosen; for example --data HFText --data.path PATH")
        teacher = check_checkpoint(self.checkpoint_dir)
        sequence_length(teacher, self.train.max_seq_length)
        self.ranking(to_come)
        if not measure.needs_tasks and (unused := changed(self.tasks)):
            raise UserError(
                f"tasks.{unused[0]} has no effect with --fitness {self.fitness}, which reads no tasks; add --fitness "
                "repaired_tasks, or leave it out"
            )
        if self.racing:
            check_can_race(measure, self.fitness, strategy)
        self._check_can_shard(n_devices(self.devices) * self.num_nodes)
        parse_rungs(self.selection, to_come)
        read_weights(self.checkpoint_dir)  # damaged weights fail before the data is read
        can_reset = issubclass(measure, Perplexity) and not issubclass(measure, Repaired)
        data = self.data if measure.needs_data() else None
        check_data(data, self.checkpoint_dir, teacher.padded_vocab_size, can_reset)
        _ = self.task_set  # raises for tasks that cannot be measured
        if is_first_started():  # reading a GPU's free memory creates a context there, so only one process does
            itemsize = weights_dtype(self.used_precision).itemsize
            measure.check(teacher, own_device(), n_params(teacher, SubNet.full(teacher)) * itemsize)

    def _check_order(self) -> None:
        """Check the order, and that `importance` is given if it is needed and used if it is given."""
        if self.order not in ("given", "importance"):
            raise UserError(f"order must be given or importance, got {self.order!r}; choose one")
        is_fine = self.space.startswith("fine")
        needs = self.order == "importance" or self.measure.needs_importance
        if self.importance is not None and not needs and not (self.simple_starts and is_fine):
            raise UserError(
                "importance is used only with --order importance, by a fitness that needs it, or for the simple "
                "starts of fine spaces; choose one of these or remove --importance"
            )
        if self.importance is None and needs:
            who = "--order importance" if self.order == "importance" else f"--fitness {self.fitness}"
            raise UserError(f"{who} needs --importance, the importance.pt of 'litgpt rank'; run that first")
        if self.order == "importance" and is_fine and self.search_space.layers != "best":
            raise UserError(
                f"order importance selects the units that coarse spaces keep, got space = {self.space}; choose a "
                "coarse one, or order its layers with --search_space.layers best"
            )

    def _check_can_shard(self, n: int) -> None:
        if self.teacher_placement != "sharded":
            return
        if n == 1:
            raise UserError("teacher_placement sharded needs several devices, got 1; raise --devices")
        if not self.measure.can_shard:
            raise UserError(
                f"fitness {self.fitness!r} needs the whole teacher on each device; use --teacher_placement replicated, "
                "or --fitness perplexity"
            )

    def ranking(self, to_come: Collection[Path] = ()) -> Ranking | None:
        """Return the teacher's ranking; None if there is none, or it is still to be written.

        Raises:
            UserError: If the ranking was made for other weights.
        """
        if self.importance is None or self.importance in to_come:
            return None
        ranking = Ranking.load(Path(self.importance), check_checkpoint(self.checkpoint_dir))
        weights = weights_fingerprint(self.checkpoint_dir)
        if (ranked := ranking.provenance.get("weights", weights)) != weights:
            raise UserError(
                f"{str(self.importance)!r} ranks other weights ({ranked}, not {weights}); rank this checkpoint"
            )
        return ranking

    @property
    def bins(self) -> list[Bin | None]:
        """The bins; None stands for any parameter count."""
        return [None] if self.bin is None else [*parse_bins(self.bin)]

    @cached_property
    def measure(self) -> type[Fitness]:
        """The class of the fitness measure."""
        found = registry.lookup("litgpt_whittle.fitness", self.fitness)
        if not (isinstance(found, type) and issubclass(found, Fitness)):
            raise UserError(
                f"the fitness {self.fitness!r} must be a subclass of litgpt_whittle.fitness.Fitness, got {found!r}; "
                "update its package"
            )
        return found

    @cached_property
    def task_set(self) -> TaskSet | None:
        """The tasks that candidates are scored on; None if the fitness needs none.

        Raises:
            UserError: If they cannot be read, or not be measured.
        """
        if not self.measure.needs_tasks:
            return None
        length = sequence_length(check_checkpoint(self.checkpoint_dir), self.train.max_seq_length)
        return read_tasks(self.tasks, self.checkpoint_dir, length, self.tasks.score)

    @property
    def made_strategy(self) -> Strategy:
        """The strategy; if only a name is given, the strategy with default settings."""
        if isinstance(self.strategy, str):  # from Python, or a name that is no class known to the command line
            return registry.lookup("litgpt_whittle.strategies", self.strategy)()
        return Evolution() if self.strategy is _DEFAULT_STRATEGY else self.strategy

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"strategy": describe(self.made_strategy)}

    @property
    def used_precision(self) -> str:
        """The precision, or the device's default."""
        return self.precision or default_precision()

    @property
    def racing_args(self) -> RacingArgs | None:
        """Settings of racing; None without it."""
        return RacingArgs() if self.racing is True else self.racing or None

    @property
    def is_sharded(self) -> bool:
        """True if each device holds a part of the teacher."""
        return self.teacher_placement == "sharded"

    def run(self) -> SearchResult | None:
        """Search, select among the best candidates, and report.

        Returns:
            The result; None on all processes but the first.

        Raises:
            UserError: For the first invalid argument, before anything expensive starts.
            Interrupted: After Ctrl-C.
        """
        self.validate()
        check_writable(self.out_dir)
        check_resumable(self.out_dir / JOURNAL, self.resume)
        plan = SearchPlan.of(self)
        fabric = launch(n_devices(self.devices), self.used_precision, self.num_nodes)
        L.seed_everything(self.seed, verbose=False)
        if plan.search_space != self.search_space and rank() == 0:
            logger.info(convertible_note(plan.teacher))
        text = ScoringText.read(self, plan)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        has_starts = self.simple_starts and not (self.resume and has_no_starts(self.out_dir / JOURNAL))
        header = journal_header(self.checkpoint_dir, plan.teacher, text, plan.settings(self, has_starts))
        with open_record(self.out_dir / JOURNAL, header, self.resume) as record:
            if rank() == 0:
                save_hyperparameters(setup, self.out_dir)
            n = n_devices(self.devices)
            selection = (
                Selection(self.checkpoint_dir, self.out_dir, self.selection, n, self.task_set)
                if self.selection.rungs
                else None
            )
            return RunningSearch(self, plan, text, record, header, selection).run(fabric)


setup = as_command(SearchConfig)
