"""Test `litgpt rank`: its outputs, reading them back, and rejected input."""

import dataclasses
import math
import sys

import pytest
import torch
import yaml
from architectures import ARCHITECTURES
from checkpoints import write_random_model
from litgpt.config import Config
from litgpt.utils import CLI, save_config
from texts import documents, write_jsonl, write_tokenizer

from litgpt_whittle import files
from litgpt_whittle.batches import BatchArgs
from litgpt_whittle.commands import rank
from litgpt_whittle.commands.rank import setup
from litgpt_whittle.data import HFText
from litgpt_whittle.errors import UserError
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.ranking.scores import LAYER_METRICS, METRICS, measure
from litgpt_whittle.reports.heat_map import plot_importance
from litgpt_whittle.supergpt import SuperGPT

TEACHER = Config.from_name(
    "Llama-3.2-1B",
    n_layer=4,
    n_embd=32,
    n_head=4,
    n_query_groups=2,
    intermediate_size=48,
    block_size=128,
    vocab_size=300,
    padded_vocab_size=300,
)
TRAIN = BatchArgs(micro_batch_size=8, max_seq_length=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a teacher and its data."""
    folder = tmp_path_factory.mktemp("rank")
    write_random_model(write_tokenizer(folder / "teacher"), TEACHER, norm_mean=1.0)
    write_jsonl(folder / "train.jsonl", documents(200))
    write_jsonl(folder / "validation.jsonl", documents(40, seed=1))
    return folder


def data(folder, **changes) -> HFText:
    return HFText(path=str(folder / "train.jsonl"), val_path=str(folder / "validation.jsonl"), **changes)


def run(folder, out_dir, **changes) -> Ranking:
    settings = {"data": data(folder), "out_dir": out_dir, "tokens": 1000, "train": TRAIN}
    setup(folder / "teacher", **(settings | changes))
    return Ranking.load(out_dir, TEACHER)


@pytest.mark.pictures
def test_a_ranking_is_left_that_loads_without_running_code(folder, tmp_path, capsys):
    ranking = run(folder, tmp_path / "out", layer_tokens=200)
    content = torch.load(tmp_path / "out/importance.pt", weights_only=True)
    assert content["version"] == 1 and content["teacher"] == TEACHER.name and content["metric"] == "activation"
    assert set(content["units"]) == set(METRICS) and set(content["layers"]) == set(LAYER_METRICS)
    assert content["provenance"]["tokens"] == 1024 and content["provenance"]["layer_tokens"] == 256  # full windows
    for scores in content["units"].values():
        assert scores["n_embd"].shape == (TEACHER.n_layer + 1, TEACHER.n_embd)
        sizes = {"n_query_groups": 2, "heads_per_group": 2, "intermediate_size": 48}
        assert [{name: len(of) for name, of in layer.items()} for layer in scores["layers"]] == [sizes] * 4
    assert {part: len(values) for part, values in content["sublayers"].items()} == {"attn": 4, "mlp": 4}
    loaded = Ranking.load(tmp_path / "out", TEACHER)
    for part, influence in content["sublayers"].items():
        assert loaded.order.sublayers[part].tolist() == influence.argsort(descending=True).tolist()
    del content["sublayers"]  # a ranking of an earlier version
    torch.save(content, tmp_path / "old.pt")
    assert Ranking.load(tmp_path / "old.pt", TEACHER).order.sublayers == {}
    assert (tmp_path / "out/importance.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out.splitlines()
    table = [line.split() for line in printed if line.strip()[:1].isdigit()]
    influence = ranking.scores.layers["block_influence"]
    assert [int(row[0]) for row in table] == influence.argsort().tolist()  # least important first
    least, parts = int(influence.argmin()), ranking.scores.sublayers
    columns = [influence[least], parts["attn"][least], parts["mlp"][least]]
    assert [float(cell) for cell in table[0][1:4]] == pytest.approx([float(value) for value in columns], rel=1e-2)
    assert "--order importance" in printed[-1]


def test_the_same_command_gives_the_same_ranking(folder, tmp_path):
    one, two = run(folder, tmp_path / "one"), run(folder, tmp_path / "two")
    assert one.fingerprint == two.fingerprint and one.provenance == two.provenance
    for ours, theirs in zip(one.scores.units["taylor"].layers, two.scores.units["taylor"].layers):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = run(folder, tmp_path / "three", data=data(folder, seed=1))
    assert other.provenance["data"] != one.provenance["data"]


def test_the_metric_orders_units_and_the_layer_metric_layers(folder, tmp_path):
    first = run(folder, tmp_path / "out")
    for metric in METRICS:
        ranking = run(folder, tmp_path / "out", metric=metric, layer_metric="perplexity", overwrite=True)
        neurons = ranking.scores.units[metric].layers[2]["intermediate_size"]
        assert ranking.order.layers[2]["intermediate_size"].tolist() == neurons.argsort(descending=True).tolist()
        channels = ranking.scores.units[metric].n_embd.sum(0)
        assert ranking.order.n_embd.tolist() == channels.argsort(descending=True).tolist()
        layers = ranking.scores.layers["perplexity"]
        assert ranking.order.n_layer.tolist() == layers.argsort(descending=True).tolist()
        assert ranking.fingerprint != first.fingerprint


def test_flags_say_what_to_do(folder, tmp_path, monkeypatch):
    argv = ["litgpt", "rank", str(folder / "teacher"), "--data", "HFText", "--data.path", str(folder / "train.jsonl")]
    argv += ["--tokens", "500", "--layer_tokens", "0", "--metric", "taylor", "--train.max_seq_length", "64"]
    monkeypatch.setattr(sys, "argv", [*argv, "--out_dir", str(tmp_path / "out")])
    CLI({"rank": setup, "other": lambda: None})
    ranking = Ranking.load(tmp_path / "out/importance.pt", TEACHER)
    assert ranking.metric == "taylor" and list(ranking.scores.layers) == ["block_influence"]
    assert ranking.scores.perplexity is None and ranking.provenance["layer_tokens"] == 0
    assert yaml.safe_load((tmp_path / "out/hyperparameters.yaml").read_text())["tokens"] == 500


@pytest.mark.parametrize(
    ("name", "n_layer_windows", "metric"),
    [
        ("latent", 0, "taylor"),
        ("Mixtral-8x7B-v0.1", 2, "magnitude"),
        ("falcon-7b", 2, "activation"),
        ("phi-2", 2, "taylor"),
    ],
)
def test_heat_maps_show_any_architecture(name, n_layer_windows, metric, tmp_path):
    config = ARCHITECTURES[name] if name != "phi-2" else dataclasses.replace(ARCHITECTURES[name], n_layer=1)
    torch.manual_seed(0)
    model = SuperGPT(config)
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.2)
    scores = measure(model, torch.randint(0, 61, (4, 16)), n_layer_windows, progress=False)
    plot_importance(Ranking(config, scores, metric, "block_influence"), tmp_path / "importance.png")
    assert (tmp_path / "importance.png").stat().st_size > 10_000


# -- rejected input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "a ranking needs data"),
        ({"metric": "taste"}, "metric must be one of activation, magnitude, taylor, got 'taste'"),
        ({"layer_metric": "taste"}, "layer_metric must be one of"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"layer_tokens": -1}, "layer_tokens must be at least 0, got -1"),
        ({"layer_metric": "perplexity", "layer_tokens": 0}, "needs layer_tokens"),
        ({"train": BatchArgs(max_seq_length=129)}, "at most the teacher's block_size 128, got 129"),
        ({"train": BatchArgs(max_seq_length=1)}, "max_seq_length must be at least 2, got 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(folder, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr(rank, "load_model", lambda *_, **__: pytest.fail("the teacher was loaded"))
    with pytest.raises(UserError, match=message) as error:
        run(folder, tmp_path / "out", **changes)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_told_before_the_data_is_read(folder, tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    save_config(TEACHER, tmp_path / "teacher")
    (tmp_path / "teacher/lit_model.pth").write_bytes(b"not weights")
    monkeypatch.setattr(rank, "read_calibration", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(UserError, match="truncated or damaged"):
        setup(tmp_path / "teacher", data(folder), tmp_path / "out", train=TRAIN)


def test_text_that_the_student_will_be_judged_on_is_refused(folder, tmp_path):
    texts = [" ".join(documents(10, seed)) for seed in range(50)]
    write_jsonl(tmp_path / "train.jsonl", texts)
    write_jsonl(tmp_path / "same.jsonl", texts[::-1])
    same = HFText(path=str(tmp_path / "train.jsonl"), val_path=str(tmp_path / "same.jsonl"))
    with pytest.raises(UserError, match="calibration and validation data must not overlap"):
        run(folder, tmp_path / "out", data=same)


def test_one_process_at_a_time_writes_a_ranking(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    with files.lock_dir(tmp_path / "out"), pytest.raises(UserError, match="another process is at work in out_dir"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_ranking_is_not_overwritten_unasked(folder, tmp_path):
    run(folder, tmp_path / "out")
    before = (tmp_path / "out/importance.pt").read_bytes()
    with pytest.raises(UserError, match="holds a ranking already; .* --overwrite true"):
        run(folder, tmp_path / "out")
    assert (tmp_path / "out/importance.pt").read_bytes() == before


def test_scores_that_are_not_finite_are_told(folder, tmp_path):
    weights = torch.load(folder / "teacher/lit_model.pth", weights_only=True)
    weights["transformer.h.1.mlp.fc_1.weight"] *= math.inf
    (tmp_path / "teacher").mkdir()
    torch.save(weights, tmp_path / "teacher/lit_model.pth")
    save_config(TEACHER, tmp_path / "teacher")
    write_tokenizer(tmp_path / "teacher")
    with pytest.raises(UserError, match="the scores are not finite in precision 32-true"):
        setup(tmp_path / "teacher", data(folder), tmp_path / "out", tokens=200, train=TRAIN, precision="32-true")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_ranking_of_this_teacher_are_refused(folder, tmp_path):
    path = tmp_path / "out/importance.pt"
    with pytest.raises(UserError, match="there is no .* create it with 'litgpt rank'"):
        Ranking.load(path, TEACHER)
    run(folder, tmp_path / "out", layer_tokens=0)
    with pytest.raises(UserError, match=r"ranks 'Llama-3.2-1B' \(.*\), not 'phi-2'"):
        Ranking.load(path, ARCHITECTURES["phi-2"])
    content = torch.load(path, weights_only=True)
    torch.save(content | {"version": 9}, path)
    with pytest.raises(UserError, match="has format 9, this version reads 1; rank again"):
        Ranking.load(path, TEACHER)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is not a file of 'litgpt rank'"):
        Ranking.load(path, TEACHER)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="is damaged, or not a file"):
        Ranking.load(path, TEACHER)
