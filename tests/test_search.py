"""Test `litgpt search`: flags, outputs, kills and resuming, and rejected input."""

import json
import shutil
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
import yaml
from checkpoints import write_random_model
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.utils import CLI

from litgpt_whittle import batches, processes
from litgpt_whittle.batches import (
    BatchArgs,
    BudgetArgs,
    fixed_batches,
)
from litgpt_whittle.checkpoint import load_model, read_weights, weights_fingerprint
from litgpt_whittle.commands import search, search_run
from litgpt_whittle.commands.search import setup
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.journal import read_journal
from litgpt_whittle.ranking.order import reorder
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.repair import costs
from litgpt_whittle.searching.args import RacingArgs
from litgpt_whittle.sharded_checkpoint import save_parts
from litgpt_whittle.spaces.args import (
    SizeArgs,
    SpaceArgs,
)
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.strategies import Evolution, RandomSearch
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.testing.inputs import random_ranking

TEACHER = Config.from_name(
    "pythia-14m",
    n_layer=4,
    n_embd=24,
    n_head=4,
    intermediate_size=48,
    block_size=16,
    padded_vocab_size=64,
    vocab_size=61,
)
BIN = "8K-10K"


class Tokens(DataModule):
    """Made-up tokens in memory."""

    def __init__(self, n: int = 6, seed: int = 0) -> None:
        super().__init__()
        self.n, self.seed = n, seed

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None, **_):
        self.batch_size, self.length = batch_size, max_seq_length + 1

    def train_dataloader(self):
        raise AssertionError("a search does not train")

    def val_dataloader(self):
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randint(0, 61, (self.n, self.length), generator=generator)
        return list(rows.split(self.batch_size)) if self.n else []


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    return write_random_model(folder, TEACHER, std=0.3, seed=seed)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "teacher")


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    """Skip drawing, which takes longer than these searches; test_report.py tests the pictures."""
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")


def run(checkpoint: Path, out_dir: Path, **changes) -> None:
    """Run a search of a few seconds at most."""
    torch.set_num_threads(1)
    settings = dict(
        bin=BIN,
        space="fine_layerwise",
        strategy=Evolution(population_size=6, elites=3, n_offspring=4),
        fitness="perplexity",
        iterations=12,
        data=Tokens(),
        train=BatchArgs(micro_batch_size=2, max_seq_length=12),
        eval=BudgetArgs(max_iters=2),
        out_dir=out_dir,
        precision="32-true",
        seed=1,
    )
    setup(checkpoint, **(settings | changes))


def lines(out_dir: Path) -> list[dict]:
    """Return a journal's lines without times."""
    found = [json.loads(line) for line in (out_dir / "journal.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def test_students_are_convertible_unless_told_otherwise(checkpoint, tmp_path, caplog):
    for convertible in (None, False):
        out = tmp_path / str(convertible)
        run(checkpoint, out, search_space=SpaceArgs(convertible=convertible), space="fine_uniform")
        assert ("--search_space.convertible false" in caplog.text) == (convertible is None)
        caplog.clear()
        header, evaluations = read_journal(out / "journal.jsonl")
        configs = [SubNet.from_dict(TEACHER, e.subnet).config for e in evaluations]
        fits = [config.n_head * config.head_size == config.n_embd for config in configs]
        assert all(fits) == (header["settings"]["search_space"].get("convertible") is True) == (convertible is None)


def test_a_search_leaves_what_it_found(checkpoint, tmp_path, capsys):
    run(checkpoint, tmp_path / "out")
    out = tmp_path / "out"
    header, evaluations = read_journal(out / "journal.jsonl")
    assert len(evaluations) == 12 and header["settings"]["strategy"] == "Evolution"
    assert header["settings"]["strategy_settings"]["population_size"] == 6
    best = min(evaluations, key=lambda e: e.scores["perplexity"])
    subnet = SubNet.load(out / "best.yaml", TEACHER)
    assert subnet.to_dict() == best.subnet
    origin = yaml.safe_load((out / "best.yaml").read_text())["provenance"]
    assert origin["perplexity"] == best.scores["perplexity"] and origin["n_params"] == best.n_params
    assert origin["bin"] == BIN and origin["evaluation"] == best.index
    for evaluation in evaluations:
        choice = SubNet.from_dict(TEACHER, evaluation.subnet)
        assert n_params(TEACHER, choice) == evaluation.n_params and evaluation.n_params in Bin.parse(BIN)
        assert (evaluation.batches, evaluation.tokens, evaluation.seed) == (2, 48, 1)
    assert capsys.readouterr().out.startswith("the report\nSub-networks, journal and report are in")

    # the score equals that of the saved sub-network
    data = Tokens()
    data.connect(batch_size=2, max_seq_length=12)
    score = Perplexity(load_model(checkpoint, "SuperGPT"), fixed_batches(data.val_dataloader(), 2, 12))
    assert score(subnet)["perplexity"] == pytest.approx(origin["perplexity"], rel=1e-5)


@pytest.mark.parametrize("space", ["coarse_uniform", "coarse_layerwise", "fine_uniform"])
def test_the_same_seed_gives_the_same_search(checkpoint, tmp_path, space):
    for name in ("one", "two"):
        run(checkpoint, tmp_path / name, space=space)
    run(checkpoint, tmp_path / "other", space=space, seed=2)
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    assert (tmp_path / "one/best.yaml").read_text() == (tmp_path / "two/best.yaml").read_text()
    assert [line.get("subnet") for line in lines(tmp_path / "one")] != [
        line.get("subnet") for line in lines(tmp_path / "other")
    ]


def test_several_bins_each_have_their_best_and_do_not_disturb_each_other(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "both", bin=["8K-10K", "14K±5%"], simple_starts=False)
    run(checkpoint, tmp_path / "one", bin="8K-10K", simple_starts=False)
    _, both = read_journal(tmp_path / "both/journal.jsonl")
    bins = ["8K-10K", "13.3K-14.7K"]  # the bins alternate by generation
    assert [e.bin for e in both] == [bin for n in (6, 4, 2) for bin in bins for _ in range(n)]
    _, alone = read_journal(tmp_path / "one/journal.jsonl")
    assert [e.subnet for e in both if e.bin == "8K-10K"] == [e.subnet for e in alone]
    for bin in ("8K-10K", "13.3K-14.7K"):
        subnet = SubNet.load(tmp_path / f"both/best-{bin}.yaml", TEACHER)
        assert n_params(TEACHER, subnet) in Bin.parse(bin)
    assert not (tmp_path / "both/best.yaml").exists()


def test_an_exhausted_space_ends_the_search_early(checkpoint, tmp_path, caplog):
    args = SpaceArgs(fixed=["head_size", "n_embd", "n_query_groups", "intermediate_size"])
    run(checkpoint, tmp_path / "out", bin="5K-40K", space="coarse_uniform", search_space=args, iterations=40)
    assert len(read_journal(tmp_path / "out/journal.jsonl")[1]) == 15
    assert "no further sub-networks: 15 evaluated" in caplog.text


@pytest.fixture(scope="module")
def importance(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("rank") / "importance.pt"
    random_ranking(TEACHER, weights=weights_fingerprint(checkpoint)).save(path)
    return path


@pytest.mark.parametrize("layers", ["any", "best"])
@pytest.mark.parametrize("space", ["coarse_uniform", "coarse_layerwise"])
def test_candidates_by_importance_are_the_reordered_teachers_prefixes(checkpoint, importance, tmp_path, space, layers):
    by_importance = {"order": "importance", "importance": importance, "search_space": SpaceArgs(layers=layers)}
    run(checkpoint, tmp_path / "out", space=space, **by_importance)
    header, evaluations = read_journal(tmp_path / "out/journal.jsonl")
    ranking = Ranking.load(importance, TEACHER)
    assert header["settings"]["order"] == "importance"
    assert header["settings"]["importance"] == ranking.fingerprint

    data = Tokens()
    data.connect(batch_size=2, max_seq_length=12)
    batches = fixed_batches(data.val_dataloader(), 2, 12)
    as_it_was, reordered = (load_model(checkpoint, "SuperGPT") for _ in range(2))
    reordered.load_state_dict(reorder(as_it_was, ranking.order))
    for evaluation in evaluations:
        subnet = SubNet.from_dict(TEACHER, evaluation.subnet)
        sizes = [subnet.layer(i).sizes for i in range(len(subnet))]
        prefix = SubNet(
            TEACHER,
            n_embd=len(subnet.n_embd),
            n_layer=subnet.n_layer,
            n_query_groups=[size[0] for size in sizes],
            intermediate_size=[size[2] for size in sizes],
        )
        expected = Perplexity(reordered, batches)(prefix)["perplexity"]
        assert evaluation.scores["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert Perplexity(as_it_was, batches)(subnet)["perplexity"] == pytest.approx(expected, rel=1e-5)
        if layers == "best":
            assert subnet.layers == tuple(sorted(ranking.order.n_layer[: len(subnet)]))
    # the best one is saved in the original teacher's order
    best = SubNet.load(tmp_path / "out/best.yaml", TEACHER)
    assert n_params(TEACHER, best) in Bin.parse(BIN)
    assert yaml.safe_load((tmp_path / "out/best.yaml").read_text())["provenance"]["order"] == "importance"
    assert any(not SubNet.from_dict(TEACHER, e.subnet).n_embd.is_prefix for e in evaluations)


def test_fine_spaces_can_keep_the_best_layers(checkpoint, importance, tmp_path):
    run(checkpoint, tmp_path / "out", order="importance", importance=importance, search_space=SpaceArgs(layers="best"))
    order = Ranking.load(importance, TEACHER).order
    for evaluation in read_journal(tmp_path / "out/journal.jsonl")[1]:
        layers = SubNet.from_dict(TEACHER, evaluation.subnet).layers
        assert layers == tuple(sorted(order.n_layer[: len(layers)]))


def test_resuming_by_another_importance_is_refused_by_name(checkpoint, importance, tmp_path):
    coarse = {"space": "coarse_layerwise", "order": "importance"}
    run(checkpoint, tmp_path / "out", iterations=3, importance=importance, **coarse)
    run(checkpoint, tmp_path / "out", iterations=5, importance=importance, resume=True, **coarse)
    run(checkpoint, tmp_path / "whole", iterations=5, importance=importance, **coarse)
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    other = tmp_path / "other.pt"
    random_ranking(TEACHER, seed=1).save(other)
    with pytest.raises(UserError, match=r"settings\.importance was "):
        run(checkpoint, tmp_path / "out", importance=other, resume=True, **coarse)
    with pytest.raises(UserError, match=r"settings\.order was importance and is given"):
        run(checkpoint, tmp_path / "out", space="coarse_layerwise", resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "importance"}, "needs --importance"),
        ({"order": "taste"}, "order must be given or importance, got 'taste'"),
        ({"importance": Path("importance.pt")}, "used only with --order importance"),
        ({"order": "importance", "importance": Path("nowhere.pt")}, "there is no 'nowhere.pt'; create it with"),
        ({"search_space": SpaceArgs(layers="best")}, "'best' needs --order importance"),
    ],
)
def test_mistakes_about_the_order_are_told(checkpoint, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        run(checkpoint, tmp_path / "out", **({"space": "coarse_uniform"} | changes))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_strategy_may_be_named(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "named", iterations=3, strategy="RandomSearch")
    run(checkpoint, tmp_path / "given", iterations=3, strategy=RandomSearch())
    assert lines(tmp_path / "named") == lines(tmp_path / "given")
    with pytest.raises(UserError, match="there is no 'Evolutoin' in litgpt_whittle.strategies; choose from EvoPress, "):
        run(checkpoint, tmp_path / "out", strategy="Evolutoin")
    assert not (tmp_path / "out").exists()


def test_an_order_that_would_do_nothing_or_of_other_weights_is_refused(checkpoint, importance, tmp_path):
    with pytest.raises(UserError, match="that coarse spaces keep, got space = fine_layerwise; choose a coarse"):
        run(checkpoint, tmp_path / "out", order="importance", importance=importance)
    retrained = make_checkpoint(tmp_path / "teacher", seed=3)
    with pytest.raises(UserError, match="ranks other weights .*; rank this checkpoint"):
        run(retrained, tmp_path / "out", space="coarse_uniform", order="importance", importance=importance)


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_search
from litgpt_whittle.fitness.perplexity import Perplexity
score = Perplexity.__call__
Perplexity.__call__ = lambda self, subnet: time.sleep(0.05) or score(self, subnet)
test_search.run(Path({checkpoint!r}), Path({out!r}), iterations=15, bin=["8K-10K", "14K"])
"""


def test_a_search_killed_and_resumed_ends_as_an_unbroken_one(checkpoint, tmp_path):
    out = tmp_path / "killed"
    script = tmp_path / "script.py"
    script.write_text(CHILD.format(tests=str(Path(__file__).parent), checkpoint=str(checkpoint), out=str(out)))
    child = forked.Program(script)
    journal = out / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 9):
        assert child.poll() is None and time.monotonic() < deadline, "the search ended before it was killed"
        time.sleep(0.002)
    child.kill()
    n_done = len(read_journal(journal)[1])
    assert 9 <= n_done < 30
    # also append a torn line, as left by a kill during a write
    journal.write_bytes(journal.read_bytes() + b'{"index": 9, "bi')
    scored = []
    score = Perplexity.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Perplexity, "__call__", lambda self, subnet: scored.append(subnet) or score(self, subnet))
        run(checkpoint, out, iterations=15, bin=["8K-10K", "14K"], resume=True)
    assert len(scored) == 30 - n_done
    run(checkpoint, tmp_path / "unbroken", iterations=15, bin=["8K-10K", "14K"])
    assert lines(out) == lines(tmp_path / "unbroken")
    for best in ("best-8K-10K.yaml", "best-13.3K-14.7K.yaml"):
        assert (out / best).read_text() == (tmp_path / "unbroken" / best).read_text()


def test_more_iterations_continue_a_finished_search(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", iterations=5)
    run(checkpoint, tmp_path / "out", iterations=13, resume=True)
    run(checkpoint, tmp_path / "whole", iterations=13)
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    best = (tmp_path / "out/best.yaml").read_text()
    with pytest.raises(UserError, match="at least 13, the journal's evaluations of a bin, got 4; raise it"):
        run(checkpoint, tmp_path / "out", iterations=4, resume=True)
    assert (tmp_path / "out/best.yaml").read_text() == best


def test_what_another_race_left_is_not_believed(checkpoint, tmp_path):
    racing = {"racing": RacingArgs(start=1), "eval": BudgetArgs(max_iters=4)}
    run(checkpoint, tmp_path / "whole", **racing)
    (tmp_path / "out").mkdir()
    leg = {"sums": [1.0, 1.0], "seconds": 0.1, "error": None, "costs": {}}
    bin = read_journal(tmp_path / "whole/journal.jsonl")[1][0].bin
    notes = [{"race": f"{bin} from 0", "candidate": i, "end": 1, "leg": leg} for i in range(6)]
    (tmp_path / "out/race.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    run(checkpoint, tmp_path / "out", **racing)
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")


def test_processes_that_read_other_text_are_told(monkeypatch):
    monkeypatch.setattr(batches, "gather", lambda digest: [digest, "other"])
    with pytest.raises(UserError, match="all devices must read the same text, but Tokens gives each device"):
        batches.check_shared(Tokens(), "one")


@pytest.mark.parametrize(
    ("environment", "rank", "is_first"),
    [({}, 0, True), ({"NODE_RANK": "0"}, 0, True), ({"NODE_RANK": "1"}, 0, False), ({"NODE_RANK": "0"}, 1, False)],
)
def test_one_process_of_all_machines_is_the_first(monkeypatch, environment, rank, is_first):
    monkeypatch.setattr(processes.rank_zero_only, "rank", rank)
    monkeypatch.delenv("NODE_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.is_first_started() == is_first


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_asks_a_device_for_its_memory_before_all_are_connected(
    checkpoint, tmp_path, monkeypatch, rank
):
    """Querying creates a context of half a gigabyte on the first GPU, once for every process that queries."""
    asked = []

    def free_memory(*_):
        asked.append(rank)
        return 2**40

    def launch(*_):
        raise InterruptedError

    monkeypatch.setattr(processes.rank_zero_only, "rank", rank)
    monkeypatch.setattr(costs, "free_memory", free_memory)
    monkeypatch.setattr(search, "launch", launch)
    with pytest.raises(InterruptedError):
        run(checkpoint, tmp_path, fitness="repaired_perplexity")
    assert asked == [0] * (rank == 0)


def test_a_checkpoint_in_parts_is_searched_like_a_whole_one(checkpoint, tmp_path):
    parts = tmp_path / "parts"
    save_parts(parts, {"weights": dict(read_weights(checkpoint))}, lambda folder: None)
    for path in checkpoint.iterdir():
        if path.name != "lit_model.pth":
            shutil.copy(path, parts)
    run(checkpoint, tmp_path / "whole")
    run(parts, tmp_path / "out")
    whole, found = (read_journal(tmp_path / name / "journal.jsonl")[1] for name in ("whole", "out"))
    assert [e.scores for e in found] == [e.scores for e in whole]


def test_failed_candidates_are_journalled_and_the_search_goes_on(checkpoint, tmp_path, monkeypatch):
    score, calls = Perplexity.__call__, []

    def failing(self, subnet):
        calls.append(subnet)
        return {"perplexity": float("inf"), "nll": float("nan")} if len(calls) == 3 else score(self, subnet)

    monkeypatch.setattr(Perplexity, "__call__", failing)
    run(checkpoint, tmp_path / "out")
    _, evaluations = read_journal(tmp_path / "out/journal.jsonl")
    assert [e.error for e in evaluations[:4]] == [None, None, "its loss is not finite", None]
    assert evaluations[2].scores == {"perplexity": None, "nll": None} and len(evaluations) == 12
    before = lines(tmp_path / "out")
    run(checkpoint, tmp_path / "out", resume=True)
    assert lines(tmp_path / "out") == before
    monkeypatch.setattr(Perplexity, "__call__", lambda *_: {"perplexity": float("nan")})
    with pytest.raises(UserError, match="no candidate could be scored"):
        run(checkpoint, tmp_path / "none", iterations=3)


@pytest.mark.parametrize("racing", [False, True])
def test_a_candidate_out_of_memory_is_scored_once_more_and_never_recorded_as_failed(
    checkpoint, tmp_path, monkeypatch, racing
):
    """The journal equals that of a search with enough memory; the error names the remedy, and resuming completes it."""
    losses, calls = Perplexity.losses, []

    def failing(fails, self, subnet, *rest):
        calls.append(self.is_halved)
        if fails(len(calls)):
            raise torch.OutOfMemoryError("made up")
        return losses(self, subnet, *rest)

    def kept(folder):
        return [(e.subnet, e.error, e.score("nll")) for e in read_journal(tmp_path / folder / "journal.jsonl")[1]]

    few = dict(racing=racing, iterations=7)
    run(checkpoint, tmp_path / "whole", **few)
    monkeypatch.setattr(Perplexity, "losses", lambda *args: failing(lambda n: n == 2, *args))
    run(checkpoint, tmp_path / "once", **few)
    assert calls[:4] == [False, False, True, False]
    for ours, theirs in zip(kept("once"), kept("whole"), strict=True):
        assert ours[:2] == theirs[:2] and ours[2] == pytest.approx(theirs[2], rel=1e-5)
    calls.clear()
    monkeypatch.setattr(Perplexity, "losses", lambda *args: failing(lambda n: n > 4, *args))
    with pytest.raises(
        UserError, match="half of train.micro_batch_size, with .* free; search .* --resume true"
    ) as error:
        run(checkpoint, tmp_path / "out", **few)
    assert "\n" not in str(error.value) and len(kept("out")) < 7
    monkeypatch.setattr(Perplexity, "losses", losses)
    run(checkpoint, tmp_path / "out", resume=True, **few)
    assert kept("out") == kept("whole")


def test_a_stopped_search_says_how_to_go_on(checkpoint, tmp_path, monkeypatch, caplog):
    score, calls = Perplexity.__call__, []

    def interrupted(self, subnet):
        calls.append(subnet)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, subnet)

    with monkeypatch.context() as patch:
        patch.setattr(Perplexity, "__call__", interrupted)
        with pytest.raises(SystemExit) as end:
            run(checkpoint, tmp_path / "out")
    assert end.value.code == 130 and "--resume" in caplog.text
    assert len(read_journal(tmp_path / "out/journal.jsonl")[1]) == 3


# -- rejected input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bin": None}, "the target size is missing"),
        ({"bin": "much"}, "a bin looks like"),
        ({"bin": "10K-8K"}, "swap"),
        ({"bin": "7B"}, "no sub-network lies in the bin .*the teacher has"),
        ({"bin": "1-50"}, "the nearest have"),
        ({"space": "coarse"}, "space must be one of"),
        ({"fitness": "taste"}, "'taste'"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"devices": 4096}, "devices must be at most"),
        ({"devices": "some"}, "devices must be 'auto' or a number"),
        ({"train": BatchArgs(2, 17)}, "block_size 16, got 17"),
        ({"data": None}, "data must be chosen"),
        ({"data": Tokens(0)}, "no token to predict"),
        ({"resume": True}, "nothing to resume"),
        ({"search_space": SpaceArgs(smallest=SizeArgs(n_embd=25))}, "smallest.n_embd must be at most the teacher's 24"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(checkpoint, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(search_run, "load_model", lambda *_, **__: pytest.fail("the teacher was loaded"))
    with pytest.raises(UserError, match=message) as error:
        run(checkpoint, tmp_path / "out", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(UserError, match="no checkpoint directory"):
        run(tmp_path / "nowhere", tmp_path / "out")


def test_an_out_dir_that_cannot_be_written_is_told(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out_dir must be a folder"):
        run(checkpoint, tmp_path / "file")


def test_a_second_search_does_not_overwrite_the_first(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", iterations=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="holds a search already; continue it with --resume"):
        run(checkpoint, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 2}, "settings.seed"),
        ({"bin": "8K-11K"}, "settings.bin"),
        ({"space": "fine_uniform"}, "settings.space"),
        ({"strategy": RandomSearch()}, "settings.strategy"),
        ({"strategy": Evolution(population_size=5)}, "settings.strategy_settings.population_size"),
        ({"search_space": SpaceArgs(layers="first")}, "settings.search_space.layers"),
        ({"data": Tokens(seed=1)}, "data.fingerprint"),
        ({"eval": BudgetArgs(1)}, "data.batches"),
        ({"precision": "bf16-true"}, "settings.precision"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(checkpoint, tmp_path, changes, name):
    run(checkpoint, tmp_path / "out", iterations=1)
    before = (tmp_path / "out/journal.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"{name} was "):
        run(checkpoint, tmp_path / "out", resume=True, **changes)
    assert (tmp_path / "out/journal.jsonl").read_bytes() == before


def test_resuming_with_other_weights_is_refused(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", iterations=1)
    retrained = make_checkpoint(tmp_path / "teacher", seed=3)
    with pytest.raises(UserError, match="teacher.weights"):
        run(retrained, tmp_path / "out", resume=True)


def test_wrong_batch_settings_are_refused():
    with pytest.raises(UserError, match="train.micro_batch_size must be at least 1"):
        BatchArgs(micro_batch_size=0)
    with pytest.raises(UserError, match="eval.max_iters must be at least 1"):
        BudgetArgs(max_iters=0)


# -- flags


def cli(*args) -> None:
    CLI(setup, args=[str(arg) for arg in args])


def test_flags_and_yaml_say_the_same(checkpoint, tmp_path, capsys):
    flags = [checkpoint, "--bin", "8K-10K,14K±5%", "--space", "coarse_uniform", "--strategy", "Evolution"]
    flags += ["--strategy.population_size", 5, "--iterations", 3, "--data", "test_search.Tokens", "--data.n", 4]
    flags += ["--fitness", "perplexity"]
    flags += [
        "--train.micro_batch_size",
        2,
        "--train.max_seq_length",
        8,
        "--eval.max_iters",
        1,
        "--precision",
        "32-true",
    ]
    flags += ["--search_space.step.intermediate_size", 4, "--search_space.fixed", "[head_size,n_embd]", "--devices", 1]
    with pytest.raises(SystemExit):
        cli(*flags, "--print_config")
    printed = capsys.readouterr().out
    shown = yaml.safe_load(printed)
    assert (
        shown["strategy"]["init_args"]["population_size"] == 5
        and shown["search_space"]["step"]["intermediate_size"] == 4
    )
    assert {
        "bin",
        "space",
        "iterations",
        "data",
        "train",
        "eval",
        "out_dir",
        "precision",
        "devices",
        "seed",
        "resume",
    } <= set(shown)
    (tmp_path / "search.yaml").write_text(printed)
    cli(*flags, "--out_dir", tmp_path / "flags")
    cli("--config", tmp_path / "search.yaml", "--out_dir", tmp_path / "yaml")
    assert lines(tmp_path / "flags") == lines(tmp_path / "yaml")
    widths = {e.subnet["intermediate_size"] for e in read_journal(tmp_path / "yaml/journal.jsonl")[1]}
    assert len(lines(tmp_path / "yaml")) == 7 and all(width % 4 == 0 for width in widths)


def test_the_default_strategy_is_evolution_with_its_settings_shown(capsys):
    with pytest.raises(SystemExit):
        cli("teacher", "--bin", "1M", "--print_config")
    shown = yaml.safe_load(capsys.readouterr().out)["strategy"]
    assert shown["class_path"].endswith("Evolution") and shown["init_args"] == Evolution().settings


def test_settings_of_the_default_strategy_need_not_name_it(capsys):
    with pytest.raises(SystemExit):
        cli("teacher", "--bin", "1M", "--strategy.elites", 3, "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["strategy"]["init_args"]["elites"] == 3


def test_strategies_and_data_are_found_by_their_bare_names(capsys):
    with pytest.raises(SystemExit):
        cli(
            "teacher",
            "--bin",
            "1M",
            "--strategy",
            "RandomSearch",
            "--data",
            "HFText",
            "--data.path",
            "x",
            "--print_config",
        )
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["strategy"]["class_path"].endswith("RandomSearch") and shown["data"]["class_path"].endswith("HFText")


def test_the_command_writes_its_hyperparameters(checkpoint, tmp_path, monkeypatch):
    argv = ["litgpt", "search", str(checkpoint), "--bin", BIN, "--iterations", "2", "--data", "test_search.Tokens"]
    argv += ["--fitness", "perplexity"]
    monkeypatch.setattr(sys, "argv", [*argv, "--train.max_seq_length", "8", "--out_dir", str(tmp_path / "out")])
    CLI({"search": setup, "other": lambda: None})
    written = yaml.safe_load((tmp_path / "out/hyperparameters.yaml").read_text())
    assert written["iterations"] == 2 and written["strategy"]["init_args"]["population_size"] == 50
