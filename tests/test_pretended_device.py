"""Test every command on a simulated accelerator: the CPU's results, no mixed devices, few waits, freed memory."""

import gc
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
from architectures import ARCHITECTURES
from checkpoints import write_random_model
from litgpt.args import EvalArgs
from litgpt.config import Config
from litgpt.data import DataModule
from pretended_device import CAN_PRETEND, NAME, MixedDevices, Seen, live_bytes, peak_bytes, pretended_device
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from litgpt_whittle import calibration, tensors
from litgpt_whittle.batches import (
    Batch,
    BatchArgs,
    BudgetArgs,
)
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.checkpoint import load_model, read_weights
from litgpt_whittle.commands import cache_teacher, distill, extract, pretrain_supernet, prune, rank, search, search_run
from litgpt_whittle.contrib.prune import SparseGPT, Sparsity
from litgpt_whittle.distillation.args import (
    DistillArgs,
    HiddenArgs,
)
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness.perplexity import Perplexity, RepairedPerplexity
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.journal import read_journal
from litgpt_whittle.least_squares import Moments
from litgpt_whittle.metrics_log import read_metrics
from litgpt_whittle.processes import release_memory
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.repair.costs import candidate_bytes, repair_bytes
from litgpt_whittle.repair.from_moments import MomentRepair
from litgpt_whittle.repair.importance import elimination_order
from litgpt_whittle.repair.sequential import SequentialRepair
from litgpt_whittle.scratch import Scratch
from litgpt_whittle.searching.args import SelectionArgs
from litgpt_whittle.searching.loop import score
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import is_tied
from litgpt_whittle.supernet import SupernetArgs
from litgpt_whittle.training.args import TrainArgs

pytestmark = pytest.mark.skipif(not CAN_PRETEND, reason="this PyTorch lets no Python code register a device")
SEQ, VOCAB = 16, 61
SIZES = dict(n_layer=3, n_embd=32, n_head=4, block_size=SEQ, vocab_size=VOCAB, padded_vocab_size=64)
TEACHERS = {
    "pythia": Config.from_name("pythia-14m", **SIZES, intermediate_size=24),
    "llama": Config.from_name("Llama-3.2-1B", **SIZES, n_query_groups=2, intermediate_size=24),
    "gemma3": replace(
        ARCHITECTURES["Gemma-3-1b-it"], **SIZES, head_size=8, sliding_window_indices=[1, 0, 1], rope_indices=[1, 0, 1]
    ),
}
FAMILIES = pytest.mark.parametrize("family", TEACHERS)
ONE_FAMILY = pytest.mark.parametrize(
    "family", ["gemma3", pytest.param("pythia", marks=pytest.mark.slow), pytest.param("llama", marks=pytest.mark.slow)]
)
"""For commands that run models in the same way as others, independent of the family"""
WINDOWS = BatchArgs(8, SEQ)
WAITS = ("sync", "upload", "index")


@dataclass
class Tokens(DataModule):
    """Noisy counting data in memory."""

    n_train: int = 32

    def __post_init__(self):
        super().__init__()

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.batch_size, self.length = batch_size, max_seq_length + 1

    def _loader(self, n: int, seed: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randint(1, 4, (n, self.length), generator=generator)
        return DataLoader(steps.cumsum(1) * (seed + 1) % VOCAB, batch_size=self.batch_size, drop_last=True)

    def train_dataloader(self):
        return self._loader(self.n_train, 0)

    def val_dataloader(self):
        return self._loader(8, 1)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Make a teacher of each family, and a sub-network of it."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, config in TEACHERS.items():
        write_random_model(folder / name, config, std=0.1, norm_mean=1.0)
        sizes = dict(n_embd=24, n_layer="0,2-" + str(config.n_layer - 1), intermediate_size=16)
        SubNet(config, **sizes).save(folder / f"{name}.yaml")
    return folder


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr(search_run, "write_report", lambda *_: "the report")


def on_both(command, out: Path, *args, **settings) -> tuple[Path, Path, Seen]:
    """Run a command on the CPU and on the device; return both output folders and the counted events."""
    command(*args, out_dir=out / "cpu", **settings)
    with pretended_device() as seen:
        command(*args, out_dir=out / "device", **settings)
    assert seen.n_operators > 100
    return out / "cpu", out / "device", seen


def same_weights(one: Path, two: Path, tolerance: float = 1e-4) -> None:
    first, second = (read_weights(folder) for folder in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=tolerance, atol=tolerance, msg=name)


@torch.no_grad()
def distance(one: Path, two: Path) -> float:
    """Return the mean divergence of two checkpoints' predictions on validation windows."""
    data = Tokens()
    data.connect(None, 8, SEQ)
    windows = next(iter(data.val_dataloader()))[:, :-1]
    said, other = (load_model(folder)(windows).double().log_softmax(-1) for folder in (one, two))
    return float((said.exp() * (said - other)).sum(-1).mean())


def same_losses(one: Path, two: Path) -> None:
    keys = ("loss", "val_loss", "teacher_val_loss")
    first, second = (
        [{k: row[k] for k in keys if k in row} for row in read_metrics(f / "metrics.jsonl")] for f in (one, two)
    )
    assert len(first) == len(second) > 2
    for row, other in zip(first, second):
        assert other == pytest.approx(row, rel=1e-4)


def train(**changes) -> dict:
    """Return the settings of a training run with three steps of two micro-batches each."""
    settings = dict(save_interval=None, log_interval=1, global_batch_size=8, micro_batch_size=4, max_norm=1.0)
    settings |= dict(max_tokens=3 * 8 * SEQ, min_lr=1e-4, lr_warmup_steps=1, max_seq_length=SEQ)
    settings |= changes.pop("train", {})
    more = dict(precision="32-true", data=Tokens(), eval=EvalArgs(interval=3, max_iters=2), devices=1)
    return more | dict(train=TrainArgs(**settings), logger_name="csv") | changes


def distilled(teachers: Path, family: str, **changes) -> dict:
    """Return the settings of such a distillation."""
    pair = dict(sub_network=teachers / f"{family}.yaml", teacher_checkpoint_dir=teachers / family)
    return train(**pair, compile=False, **changes)


def searched(family: str, **changes) -> dict:
    """Return the settings of a search."""
    teacher = TEACHERS[family]
    n = n_params(teacher, SubNet.full(teacher))
    settings = dict(bin=f"{int(0.5 * n)}-{int(0.8 * n)}", fitness="perplexity", iterations=4, data=Tokens())
    return settings | dict(train=WINDOWS, eval=BudgetArgs(1), precision="32-true") | changes


# -- the device itself


def test_what_a_gpu_refuses_is_refused_and_what_it_allows_is_allowed():
    with pretended_device():
        here, there = torch.ones(3), torch.ones(3, device=NAME)
        first, second = torch.tensor([0, 1]), torch.tensor([0, 1], device=NAME)
        refused = [
            lambda: here + there,
            lambda: there.add_(here),
            lambda: torch.cat([here, there]),
            lambda: torch.nn.functional.linear(there[None], here[None]),
            lambda: torch.nn.functional.embedding(second, here[:, None]),
            lambda: here[second],
            lambda: there.index_put_((second,), here[:2]),
            lambda: torch.where(there > 0, here, there),
            lambda: torch.randn(3, device=NAME, generator=torch.Generator()),
        ]
        for function in refused:
            with pytest.raises(MixedDevices):
                function()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        allowed = [there + torch.tensor(2.0), there * 3 / here.sum(), there[first] + 2, there.clone().copy_(here) + 2]
        for tensor in allowed:
            assert tensor.device.type == NAME
        assert [x.tolist()[:2] for x in allowed] == [[3, 3], [1, 1], [3, 3], [3, 3]]


def test_waits_and_bytes_are_counted():
    with pretended_device() as seen:
        before = live_bytes()
        x = torch.zeros(100).to(NAME)
        assert seen.total("upload") == 1 and seen.total("sync") == 0
        x.sum().item(), x.cpu(), x.nonzero(), x[x > 0], x.tolist(), bool(x[0] > 0)
        assert seen.total("sync") == 6
        torch.zeros(100).to(NAME, non_blocking=True), x + 1.0, x[3:], x.view(10, 10), x.double()
        assert seen.total("upload") == 1 and seen.total("sync") == 6
        x[torch.tensor([1, 2])]
        assert seen.total("index") == 1
        view = x[50:]
        del x
        assert live_bytes() == before + 400  # bytes of the storage that a view keeps alive
        del view
        assert live_bytes() == before


def test_the_device_is_there_only_when_it_is_asked_for():
    with pretended_device():
        assert L.Fabric(devices=1).device.type == NAME and torch.accelerator.is_available()
    assert L.Fabric(devices=1).device.type != NAME and not torch.accelerator.is_available()


def test_a_full_device_raises_pytorchs_error():
    with pretended_device(capacity=1000) as seen, peak_bytes() as peak:
        x = torch.ones(200, device=NAME)
        assert torch.pretended.mem_get_info() == (200, 1000 + live_bytes() - 800)
        with pytest.raises(torch.OutOfMemoryError):
            x + 1
        x.add_(1), x[:50] + 1
        release_memory()
    assert peak.total == 1000 and seen.total("emptied") == 1


# -- the CPU's results


@pytest.mark.parametrize(
    "family, fitness",
    [
        ("gemma3", "perplexity"),
        *((family, "repaired_perplexity") for family in TEACHERS),
        *(pytest.param(family, "perplexity", marks=pytest.mark.slow) for family in ("pythia", "llama")),
    ],
)
def test_a_search_gives_the_cpus_scores_and_its_memory_back(family, fitness, teachers, tmp_path):
    before = live_bytes()
    one, two, _ = on_both(search.setup, tmp_path, teachers / family, **searched(family, fitness=fitness))
    gc.collect()
    assert live_bytes() == before
    first, second = (read_journal(folder / "journal.jsonl")[1] for folder in (one, two))
    assert [e.subnet for e in first] == [e.subnet for e in second]
    for evaluation, other in zip(first, second):  # the repair multiplies in float64 only on a CPU
        assert other.scores == pytest.approx(evaluation.scores, rel=1e-4 if fitness == "repaired_perplexity" else 1e-5)


@FAMILIES
@pytest.mark.parametrize("passes", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_repair_gives_the_cpus_student(family, passes, teachers, tmp_path):
    settings = dict(repair=RepairArgs(tokens=24 * SEQ, refine_passes=passes), data=Tokens(), train=WINDOWS)
    one, two, _ = on_both(extract.setup, tmp_path, teachers / family, teachers / f"{family}.yaml", **settings)
    assert distance(one, two) < 0.02 * distance(teachers / family, one)


@FAMILIES
@pytest.mark.parametrize("hidden", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_live_distillation_gives_the_cpus_student(family, hidden, teachers, tmp_path):
    losses = DistillArgs(hidden=HiddenArgs(weight=0.3, attention=0.1)) if hidden else DistillArgs()
    one, two, _ = on_both(distill.setup, tmp_path, **distilled(teachers, family, distill=losses))
    same_losses(one, two)
    same_weights(one / "final", two / "final")


@ONE_FAMILY
def test_a_cached_distillation_gives_the_cpus_student(family, teachers, tmp_path):
    caching = dict(codec="full", train=cache_teacher.WindowArgs(8, SEQ), precision="32-true", data=Tokens())
    cache = on_both(cache_teacher.setup, tmp_path / "cache", teachers / family, **caching)[1]
    one, two, _ = on_both(distill.setup, tmp_path, teacher_cache=cache, **distilled(teachers, family))
    same_losses(one, two)
    same_weights(one / "final", two / "final")


@ONE_FAMILY
def test_a_ranking_gives_the_cpus_scores(family, teachers, tmp_path):
    settings = dict(data=Tokens(), tokens=16 * SEQ, layer_tokens=8 * SEQ, train=WINDOWS, precision="32-true")
    folders = on_both(rank.setup, tmp_path, teachers / family, **settings)[:2]
    one, two = (Ranking.load(folder, TEACHERS[family]).scores for folder in folders)
    for name in one.layers:
        torch.testing.assert_close(two.layers[name], one.layers[name], rtol=1e-4, atol=1e-5)
    for name in one.units:
        torch.testing.assert_close(two.units[name].n_embd, one.units[name].n_embd, rtol=1e-4, atol=1e-6)


@ONE_FAMILY
@pytest.mark.parametrize("method", ["sparsegpt", pytest.param("wanda", marks=pytest.mark.slow)])
def test_pruning_gives_the_cpus_predictions(family, method, teachers, tmp_path):
    settings = dict(method=method, data=Tokens(), tokens=16 * SEQ, train=WINDOWS, eval=BudgetArgs(1))
    settings |= dict(pattern="2:4", refit=True) if method == "wanda" else {}
    one, two, _ = on_both(prune.setup, tmp_path, teachers / family, **settings)
    assert distance(one, two) < 0.02 * distance(teachers / family, one)


@ONE_FAMILY
def test_a_supernet_gives_the_cpus_weights(family, teachers, tmp_path):
    settings = train(initial_checkpoint_dir=teachers / family, supernet=SupernetArgs(n_validated=0))
    one, two, _ = on_both(pretrain_supernet.setup, tmp_path, **settings)
    same_losses(one, two)
    same_weights(one / "final", two / "final")


@pytest.mark.slow
@FAMILIES
def test_a_resumed_training_with_recomputed_activations_gives_the_cpus_student(family, teachers, tmp_path):
    settings = distilled(teachers, family, activation_checkpointing=True, train={"save_interval": 1})
    on_both(distill.setup, tmp_path, **settings)
    for name in ("cpu", "device"):
        shutil.rmtree(tmp_path / name / "final")
        shutil.rmtree(tmp_path / name / "step-00000003")
    one, two, _ = on_both(distill.setup, tmp_path, **settings, resume=True)
    same_weights(one / "final", two / "final")


@pytest.mark.parametrize("command", ["extract", "distill", "search", "rank", "cache_teacher"])
def test_commands_run_on_a_device_without_float64(command, teachers, tmp_path, monkeypatch):
    """Like MPS, which has none; sums over many tokens are less exact there."""
    monkeypatch.setattr(tensors, "WITHOUT_FLOAT64", {NAME})
    out, teacher = tmp_path / "out", teachers / "llama"
    few = dict(data=Tokens(), train=WINDOWS)
    commands = {
        "extract": lambda: extract.setup(
            teacher, teachers / "llama.yaml", out, repair=RepairArgs(tokens=24 * SEQ, refine_passes=0.2), **few
        ),
        "distill": lambda: distill.setup(out_dir=out, **distilled(teachers, "llama")),
        "search": lambda: search.setup(
            teacher, out_dir=out, **searched("llama", fitness="repaired_perplexity", iterations=2)
        ),
        "rank": lambda: rank.setup(teacher, out_dir=out, tokens=4 * SEQ, layer_tokens=SEQ, precision="32-true", **few),
        "cache_teacher": lambda: cache_teacher.setup(
            teacher, out_dir=out, data=Tokens(), train=cache_teacher.WindowArgs(8, SEQ), precision="32-true"
        ),
    }
    with pretended_device(has_float64=False):
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(1, dtype=torch.float64, device=NAME)
        commands[command]()
    assert any(out.iterdir())


# -- waits and memory


def waits_of_candidates(measure: type[Perplexity], n_layer: int, folder: Path, **wanted) -> tuple[float, Seen]:
    """Return the number of host waits for each of three candidates, whose units are the same in all layers."""
    config = replace(TEACHERS["llama"], n_layer=n_layer)
    write_random_model(folder, config, std=0.1, norm_mean=1.0)
    ids = torch.randint(VOCAB, (8, SEQ), generator=torch.Generator().manual_seed(0))
    subnets = [SubNet(config, n_embd=f"0-{8 + i},16-31", intermediate_size=f"0-{5 + i},12-23") for i in range(4)]
    with pretended_device() as seen, torch.inference_mode():
        fitness = measure(load_model(folder, "SuperGPT", device=NAME), [Batch(ids, ids)], **wanted)
        fitness(subnets[0])
        seen.events.clear()
        for subnet in subnets[1:]:
            fitness(subnet)
    return seen.total(*WAITS) / 3, seen


def test_a_candidates_score_is_read_with_two_waits(tmp_path):
    _, seen = waits_of_candidates(Perplexity, 3, tmp_path)
    assert seen.total("sync") <= 3 * 2, seen.table()  # the losses and the numbers of tokens


def test_waits_for_a_candidate_do_not_grow_with_its_layers(tmp_path):
    few, many = (waits_of_candidates(Perplexity, n, tmp_path / str(n)) for n in (3, 5))
    assert many[0] <= few[0], many[1].table()


def test_waits_for_a_repaired_candidate_stay_below_a_limit_per_layer(tmp_path):
    calibration = torch.randint(VOCAB, (16, SEQ), generator=torch.Generator().manual_seed(1))
    few, many = (waits_of_candidates(RepairedPerplexity, n, tmp_path / str(n), calibration=calibration) for n in (2, 4))
    assert (many[0] - few[0]) / 2 <= 40, many[1].table()


@pytest.mark.parametrize("n_keep", [0, 5])
def test_the_elimination_order_of_more_units_needs_no_more_waits(n_keep):
    waits = []
    generator = torch.Generator().manual_seed(0)
    for n in (12, 30):
        z, weight = torch.randn(200, n, generator=generator), torch.randn(4, n, generator=generator)
        covariance, units = z.T @ z, torch.arange(n)
        with pretended_device() as seen:
            there = (x.to(NAME) for x in (covariance, weight, units[:, None]))
            order = elimination_order(*there, n_keep=n_keep)
        assert order == elimination_order(covariance, weight, units[:, None], n_keep=n_keep)
        waits.append(seen.total("sync"))
    assert waits[0] == waits[1] <= 2, seen.table()  # the order, and whether it could be computed


def test_sums_over_tokens_do_not_wait():
    generator = torch.Generator().manual_seed(0)
    z, y, weights = (torch.rand(*shape, generator=generator) for shape in ((20, 6), (20, 4), (20,)))
    with pretended_device() as seen:
        sums = Moments(6, 4, NAME)
        z, y, weights = (tensor.to(NAME) for tensor in (z, y, weights))
        before = seen.total(*WAITS)
        sums.add(z, y, weights)
        sums.add(z, y)
        assert seen.total(*WAITS) == before, seen.table()


def test_sparsegpt_does_not_wait_for_each_column():
    waits = []
    for n in (16, 32):
        z, weight = torch.randn(200, n), torch.randn(8, n)
        with pretended_device() as seen:
            moments = Moments(n, 1, NAME)
            moments.add(z.to(NAME), z[:, :1].to(NAME))
            seen.events.clear()
            SparseGPT(Sparsity.parse(0.5, None)).prune(weight.to(NAME), moments)
        waits.append(seen.total("sync"))
    assert waits[0] == waits[1] <= 3, seen.table()  # the damping, and whether the matrices could be factored


@pytest.fixture(scope="module")
def watched(teachers, tmp_path_factory):
    """Return a function that trains once on the device, and returns the waits per step and the device's counts."""

    @cache
    def watch(command: str) -> tuple[list[int], Seen]:
        out, hidden = tmp_path_factory.mktemp("watched") / command, DistillArgs(hidden=HiddenArgs(weight=0.3))
        repair = dict(repair=RepairArgs(tokens=24 * SEQ, refine_passes=1), data=Tokens(), train=WINDOWS)
        teacher, subnet = teachers / "llama", teachers / "llama.yaml"
        if command == "cached":
            windows = cache_teacher.WindowArgs(8, SEQ)
            cache_teacher.setup(teacher, Tokens(), out.with_name("cache"), train=windows, precision="32-true")
        cached = dict(teacher_cache=out.with_name("cache"))
        commands = {
            "distill": lambda: distill.setup(out_dir=out, **distilled(teachers, "llama", distill=hidden)),
            "cached": lambda: distill.setup(out_dir=out, **distilled(teachers, "llama", **cached)),
            "supernet": lambda: pretrain_supernet.setup(out_dir=out, **train(initial_checkpoint_dir=teacher)),
            "refine": lambda: extract.setup(teacher, subnet, out, **repair),
        }
        totals: list[int] = []
        with pretended_device() as seen:
            hook = register_optimizer_step_post_hook(lambda *_: totals.append(seen.total(*WAITS)))
            try:
                commands[command]()
            finally:
                hook.remove()
        return [after - before for before, after in zip(totals, totals[1:])], seen

    return watch


@pytest.mark.parametrize("command", ["distill", "cached", "supernet"])
def test_an_optimizer_step_waits_for_its_loss_and_the_log_only(command, watched):
    waits, seen = watched(command)
    assert len(waits) == 2 and max(waits) <= 2, seen.table()


@pytest.mark.parametrize("command", ["distill", "supernet", "refine"])
def test_files_hold_tensors_that_a_machine_without_the_device_can_load(command, watched):
    _, seen = watched(command)
    assert seen.total("saved") == 0, seen.table()


def test_a_candidate_that_does_not_fit_is_scored_in_halves_of_its_micro_batch(teachers):
    """With the CPU's score; if it does not fit then either, the search ends."""
    ids = torch.randint(VOCAB, (8, SEQ), generator=torch.Generator().manual_seed(0))
    subnet = SubNet(TEACHERS["llama"], n_embd=24)
    expected = Perplexity(load_model(teachers / "llama", "SuperGPT"), [Batch(ids, ids)])(subnet)
    with pretended_device():
        fitness = Perplexity(load_model(teachers / "llama", "SuperGPT", device=NAME), [Batch(ids, ids)])
        fitness(subnet)  # creates its modules
        with peak_bytes() as whole:
            fitness(subnet)
        with peak_bytes() as halves, fitness.halved():
            fitness(subnet)
    assert halves.total < whole.total
    with pretended_device(capacity=(halves.total + whole.total) // 2) as seen:
        assert score(fitness, subnet).scores == pytest.approx(expected, rel=1e-5)
    assert seen.total("emptied") == 1
    with pretended_device(capacity=halves.total - 1), pytest.raises(UserError, match="must fit into memory"):
        score(fitness, subnet)


LARGE = SIZES | {"n_layer": 1, "n_embd": 64}
REPAIRED = {
    "pythia": Config.from_name("pythia-14m", **LARGE, intermediate_size=128),
    "llama": Config.from_name("Llama-3.2-1B", **LARGE, n_query_groups=2, intermediate_size=160),
    "mixtral": Config.from_name("Mixtral-8x7B-v0.1", **LARGE, n_query_groups=2, intermediate_size=96, n_expert=3),
    "many_tokens": Config.from_name(
        "Llama-3.2-1B",
        **LARGE | dict(n_embd=32, vocab_size=2000, padded_vocab_size=2000),
        n_query_groups=2,
        intermediate_size=32,
    ),
}
"""Teachers whose moments (for the last one: predictions) need much more memory than the activations of few tokens"""


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in REPAIRED if name != "llama")]
)
@pytest.mark.filterwarnings("ignore:.* calibration tokens are fewer")
def test_the_memory_of_a_repair_is_estimated_from_above(name, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "CACHE_PARTS", 2**60)  # activations are cached only in free memory
    config, device = REPAIRED[name], torch.device(NAME)
    slack = 1.25 if config.n_expert else 1.0  # activations are not counted, and experts have many
    torch.manual_seed(0)
    write_random_model(tmp_path, config, std=0.1, norm_mean=1.0)
    shape = (16, 8) if name in ("pythia", "llama") else (48, 8)
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    weights = read_weights(tmp_path)
    subnet = SubNet(config, n_embd=config.n_embd * 7 // 8, intermediate_size=config.intermediate_size * 7 // 8)
    with pretended_device(), peak_bytes() as peak:
        calibrated = Calibration(ids, shape[0] // 8, NAME)
        SequentialRepair(weights, subnet, calibrated, RepairArgs(), Scratch(tmp_path / "scratch", "")).run(
            progress=False
        )
    assert peak.total <= slack * repair_bytes(subnet, is_tied(weights), device) <= 2 * peak.total
    with pretended_device():
        repair = MomentRepair(load_model(tmp_path, "SuperGPT", device=NAME), ids, 2)
        with peak_bytes() as peak:
            repair.student(subnet)
    assert peak.total <= slack * candidate_bytes(config, device) <= 2 * peak.total


@pytest.mark.parametrize("fitness", ["perplexity", "repaired_perplexity"])
def test_a_search_gives_its_memory_back_before_the_selection(fitness, teachers, tmp_path, monkeypatch):
    gc.collect()
    before, during = live_bytes(), []
    monkeypatch.setattr(search_run.Selection, "run", lambda *_: during.append(live_bytes()) or {})
    (tmp_path / "distill.yaml").write_text("compile: false\ndata: TextFiles\n")
    selection = SelectionArgs(["1x100"], tmp_path / "distill.yaml")
    with pretended_device():
        settings = searched("llama", fitness=fitness, selection=selection, out_dir=tmp_path / "out")
        search.setup(teachers / "llama", **settings)
    assert during == [before]
