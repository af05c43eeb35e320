"""Test proxies against counting weights and units one by one, and a search that uses them."""

import copy
import json

import pytest
import torch
from architectures import ARCHITECTURES, subnets
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fitness import PYTHIA
from test_search import TEACHER, make_checkpoint, run

from litgpt_whittle import registry
from litgpt_whittle.commands import search_run
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness import proxies
from litgpt_whittle.fitness.proxies import BlockInfluence, ImportanceMass, WeightMagnitude
from litgpt_whittle.journal import read_journal
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.subnet import SubNet, experts_of
from litgpt_whittle.supergpt import SuperGPT, extract_weights, student_model
from litgpt_whittle.testing.inputs import random_ranking, super_network

NAMES = ["phi-2", "Gemma-2-2b", "Qwen3-30B-A3B", "OLMo-2-1124-7B", "Llama-3.1-8B", "latent"]
TEACHERS = {name: super_network(ARCHITECTURES[name]) for name in NAMES}


def magnitude(model: SuperGPT, subnet: SubNet) -> float:
    """Return Σ |w| of the extracted model's parameters, weight by weight, in float64."""
    student = student_model(subnet)
    student.load_state_dict(extract_weights(model, subnet, model.tied))
    if model.tied:
        student.lm_head.weight = student.transformer.wte.weight
    return sum(float(parameter.detach().double().abs().sum()) for parameter in student.parameters())


@given(st.data())
@settings(max_examples=30)
def test_lost_magnitude_is_that_of_the_weights_left_out(data):
    model = TEACHERS[data.draw(st.sampled_from(NAMES))]
    score = WeightMagnitude(model)
    for _ in range(2):
        subnet = data.draw(subnets(model.config, sublayers=True))
        expected = 1 - magnitude(model, subnet) / magnitude(model, SubNet.full(model.config))
        assert score(subnet)["magnitude_lost"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", [*NAMES, "pythia-14m"])
def test_the_whole_teacher_loses_nothing(name):
    model = TEACHERS.get(name) or super_network(PYTHIA)
    full, ranking = SubNet.full(model.config), random_ranking(model.config)
    assert WeightMagnitude(model)(full)["magnitude_lost"] == pytest.approx(0, abs=1e-12)
    for measure in (ImportanceMass, BlockInfluence):
        assert list(measure(model, importance=ranking)(full).values()) == pytest.approx([0], abs=1e-12)


def test_tied_weights_count_once():
    model = super_network(PYTHIA)
    model.lm_head.weight = model.transformer.wte.weight
    subnet = SubNet(model.config, n_embd=7, n_layer="0,2")
    expected = 1 - magnitude(model, subnet) / magnitude(model, SubNet.full(model.config))
    assert WeightMagnitude(model)(subnet)["magnitude_lost"] == pytest.approx(expected, abs=1e-6)


def test_weights_are_looked_at_once_for_each_choice_of_channels(monkeypatch):
    model = super_network(PYTHIA)
    score, channels = WeightMagnitude(model), "0-4,9-20"
    score(SubNet(model.config, n_embd=channels))
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *_, **__: pytest.fail("weights were read again"))
    subnet = SubNet(model.config, n_embd=channels, n_layer="1,2", n_query_groups=["1,3", 2], intermediate_size="5-40")
    assert score(subnet)["magnitude_lost"] == pytest.approx(
        1 - magnitude(model, subnet) / magnitude(model, SubNet.full(model.config)), abs=1e-6
    )


def test_chunks_and_bf16_change_nothing_but_roundings(monkeypatch):
    model = super_network(PYTHIA)
    subnet = SubNet(model.config, n_embd="3-20", intermediate_size=9)
    whole = WeightMagnitude(model)(subnet)["magnitude_lost"]
    monkeypatch.setattr(proxies, "CHUNK_ELEMENTS", 1)
    assert WeightMagnitude(model)(subnet)["magnitude_lost"] == pytest.approx(whole, abs=1e-7)
    assert WeightMagnitude(copy.deepcopy(model).bfloat16())(subnet)["magnitude_lost"] == pytest.approx(whole, abs=1e-3)


def importance_lost(ranking: Ranking, subnet: SubNet) -> float:
    """Count kind by kind, layer by layer, unit by unit."""
    units, config = ranking.scores.units[ranking.metric], subnet.teacher
    kept: dict[str, list[float]] = {"n_embd": []}
    everything: dict[str, list[float]] = {"n_embd": units.n_embd.flatten().tolist()}
    for layer in [*subnet.layers, config.n_layer]:
        kept["n_embd"] += [float(units.n_embd[layer, channel]) for channel in subnet.n_embd.indices]
    for layer, own in enumerate(units.layers):
        for kind, scores in own.items():
            if len(scores) == 1:
                continue
            everything.setdefault(kind, []).extend(scores.tolist())
            if layer not in subnet.layers:
                continue
            keep = getattr(subnet.layer(subnet.layers.index(layer)), kind.removeprefix("moe_"))
            if keep is None:
                continue
            chosen = experts_of(config, keep) if kind == "n_expert" else keep.indices
            kept.setdefault(kind, []).extend(float(scores[unit]) for unit in chosen)
    shares = [sum(kept.get(kind, [])) / sum(everything[kind]) for kind in everything]
    return 1 - sum(shares) / len(shares)


@given(st.data())
@settings(max_examples=30)
def test_lost_importance_is_that_of_the_units_left_out(data):
    model = TEACHERS[data.draw(st.sampled_from(NAMES))]
    ranking = random_ranking(model.config, data.draw(st.integers(0, 9)))
    subnet = data.draw(subnets(model.config, sublayers=True))
    score = ImportanceMass(model, importance=ranking)
    assert score(subnet)["importance_lost"] == pytest.approx(importance_lost(ranking, subnet), abs=1e-12)


@pytest.mark.parametrize("kind", ["n_query_groups", "heads_per_group", "intermediate_size", "n_embd"])
def test_each_kind_of_units_has_the_same_say(kind):
    model = TEACHERS["Llama-3.1-8B"]  # two query groups of two heads
    ranking = random_ranking(model.config)
    units = ranking.scores.units["activation"]
    scores = units.n_embd if kind == "n_embd" else torch.stack([own[kind] for own in units.layers])
    lost = ImportanceMass(model, importance=ranking)(SubNet(model.config, **{kind: 1}))["importance_lost"]
    assert lost == pytest.approx(float(scores[:, 1:].sum() / scores.sum()) / 4)


def test_lost_influence_is_that_of_the_layers_left_out():
    model = super_network(PYTHIA)
    ranking = random_ranking(model.config)
    score = BlockInfluence(model, importance=ranking)
    influence = ranking.scores.layers["block_influence"].tolist()
    for layers, left_out in (("0,1", [2]), ("1-1", [0, 2]), ("0,2", [1])):
        expected = sum(influence[layer] for layer in left_out) / sum(influence)
        assert score(SubNet(model.config, n_layer=layers))["influence_lost"] == pytest.approx(expected)
        assert score(SubNet(model.config, n_layer=layers, n_embd=5))["influence_lost"] == pytest.approx(expected)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "teacher")


@pytest.mark.parametrize("fitness", ["weight_magnitude", "importance_mass", "block_influence"])
def test_a_search_by_a_proxy(checkpoint, tmp_path, monkeypatch, fitness):
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")
    measure, ranking = registry.lookup("litgpt_whittle.fitness", fitness), random_ranking(TEACHER)
    ranking.save(tmp_path / "importance.pt")
    wanted = {"importance": tmp_path / "importance.pt"} if fitness != "weight_magnitude" else {}
    run(checkpoint, tmp_path / "out", fitness=fitness, iterations=8, data=None, **wanted)
    model = SuperGPT(TEACHER)
    model.load_state_dict(torch.load(checkpoint / "lit_model.pth"))
    score = measure(model, **({"importance": ranking} if wanted else {}))
    header, evaluations = read_journal(tmp_path / "out/journal.jsonl")
    assert header["settings"]["score"] == measure.name and len(evaluations) == 8
    for evaluation in evaluations:
        assert evaluation.scores == pytest.approx(score(SubNet.from_dict(TEACHER, evaluation.subnet)))
        assert (evaluation.batches, evaluation.tokens) == (0, 0)
    json.dumps(header)


def test_a_search_by_importance_mass_needs_importance_and_the_same_when_it_goes_on(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")
    with pytest.raises(UserError, match="--fitness importance_mass needs --importance"):
        run(checkpoint, tmp_path / "out", fitness="importance_mass")
    ranking = random_ranking(TEACHER)
    ranking.save(tmp_path / "importance.pt")
    ranking.scores.layers["block_influence"].mul_(2)  # the same order
    ranking.save(tmp_path / "other.pt")
    settings = {"fitness": "importance_mass", "iterations": 3}
    run(checkpoint, tmp_path / "out", importance=tmp_path / "importance.pt", **settings)
    with pytest.raises(UserError, match=r"settings\.importance was "):
        run(checkpoint, tmp_path / "out", importance=tmp_path / "other.pt", resume=True, **settings)
