"""Test perplexity against the plain formula on the extracted model."""

import dataclasses
import math

import pytest
import torch
from architectures import ARCHITECTURES
from litgpt.config import Config
from litgpt.model import GPT
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_whittle import registry, supergpt
from litgpt_whittle.batches import fingerprint, fixed_batches
from litgpt_whittle.distillation import head
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness import perplexity as fitness
from litgpt_whittle.fitness.kl import KLDivergence
from litgpt_whittle.fitness.perplexity import Perplexity, RepairedPerplexity
from litgpt_whittle.index_plan import ParamSlice, plan
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import extract_weights, student_model
from litgpt_whittle.testing.fitness import CHECKS, check_formula
from litgpt_whittle.testing.inputs import random_tokens, super_network

PYTHIA = Config.from_name("pythia-14m", n_layer=3, n_embd=32, n_head=4, intermediate_size=64, block_size=24)


def loader(sizes=(4, 4, 2), length=17) -> list[torch.Tensor]:
    return random_tokens(sizes, length)


def plain(student: GPT, teacher: GPT, batches) -> dict[str, float]:
    """Return the scores by the mean over all tokens, token by token."""
    losses = []
    for ids, targets in batches:
        log_p = student(ids).log_softmax(-1)
        for row, target in zip(log_p.flatten(0, 1), targets.flatten()):
            if target != -100:
                losses.append(-row[target])
    nll = float(torch.stack(losses).mean())
    return {"nll": nll, "perplexity": math.exp(nll)}


@pytest.mark.parametrize("name", registry.names("litgpt_whittle.fitness"))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_fitness_keeps_the_rules(name, check):
    check(registry.lookup("litgpt_whittle.fitness", name))


@pytest.mark.parametrize("name", ["Gemma-2-2b", "Qwen3-30B-A3B", "OLMo-2-1124-7B", "phi-2"])
def test_perplexity_is_the_plain_formula(name):
    check_formula(Perplexity, plain, ARCHITECTURES[name], rel=3e-5)


def test_tokens_weigh_the_same_in_batches_of_any_size_and_ignored_ones_nothing():
    model = super_network(PYTHIA)
    subnet = SubNet(model.config, n_embd=20, n_query_groups=2)
    batches = [{"input_ids": ids, "labels": ids.clone()} for ids in loader((3, 1), 13)]
    batches[0]["labels"][:, :7] = -100
    batches.insert(1, {"input_ids": batches[0]["input_ids"], "labels": torch.full((3, 13), -100)})
    fixed = fixed_batches(batches, 9, 24)
    score = Perplexity(model, fixed)
    assert len(fixed) == 2 and score.n_tokens == 3 * 6 + 12  # the first label of a row is not predicted
    student = student_model(subnet)
    student.load_state_dict(extract_weights(model, subnet))
    with torch.no_grad():
        assert score(subnet) == pytest.approx(plain(student.double().eval(), model, fixed), rel=3e-5)


def test_batches_are_read_once_and_cut():
    batches = fixed_batches(iter(loader()), 2, 10)
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(4, 10), (4, 10)]
    torch.testing.assert_close(batches[0].targets, loader()[0][:, 1:11])
    prints = {
        fingerprint(fixed_batches(data, n, t)) for data in (loader(), loader()[::-1]) for n in (1, 2) for t in (8, 9)
    }
    assert len(prints) == 8
    assert fingerprint(batches) == fingerprint(fixed_batches(loader(), 2, 10))


@pytest.mark.parametrize("data", [[], [{"input_ids": torch.ones(2, 5), "labels": torch.full((2, 5), -100)}]])
def test_data_without_a_token_is_refused(data):
    with pytest.raises(UserError, match="no token to predict"):
        fixed_batches(data, 3, 8)


def test_samples_of_a_single_token_are_refused():
    with pytest.raises(UserError, match="at least 2 tokens"):
        fixed_batches([torch.zeros(2, 1)], 3, 8)


def test_weights_are_sliced_once_per_candidate(monkeypatch):
    model = super_network(PYTHIA)
    subnet = SubNet(model.config, n_embd="1-20", n_layer=2, n_query_groups=[2, 3])
    calls = []
    take = ParamSlice.__call__
    monkeypatch.setattr(ParamSlice, "__call__", lambda self, tensor: calls.append(self.name) or take(self, tensor))
    Perplexity(model, fixed_batches(loader(), 3, 16))(subnet)
    assert len(calls) == len(plan(model.config, subnet))


def test_bf16_is_used_where_asked_for():
    model = super_network(PYTHIA)
    subnet = SubNet(model.config, n_embd=24)
    batches = fixed_batches(loader(), 3, 16)
    exact = Perplexity(model, batches)(subnet)["nll"]
    mixed = Perplexity(model, batches, autocast=lambda: torch.autocast("cpu", torch.bfloat16))(subnet)["nll"]
    true = Perplexity(model.bfloat16(), batches)(subnet)["nll"]
    for rough in (mixed, true):
        assert rough != exact and rough == pytest.approx(exact, rel=0.02)


class Largest(TorchDispatchMode):
    """Record the largest tensor that any operation creates."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_logits_never_exist_whole(monkeypatch):
    monkeypatch.setattr(head, "TILE", (64, 32))
    model = super_network(dataclasses.replace(PYTHIA, block_size=256))
    score = Perplexity(model, fixed_batches(loader((4,), 257), 1, 256))
    with Largest() as largest:
        score(SubNet(model.config, n_embd=8, n_layer=1, n_query_groups=1, intermediate_size=4))
    n_logits = 4 * 256 * 64
    assert 0 < largest.numel < n_logits / 2


def test_rows_may_run_in_several_forward_passes(monkeypatch):
    model = super_network(PYTHIA)
    subnet = SubNet(model.config, n_embd="1-20", n_query_groups=[2, 3, 1])
    score = Perplexity(model, fixed_batches(loader(), 3, 16))
    whole = score(subnet)["nll"]
    shapes = []
    model.transformer.h[0].register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape[:2])))
    for most, rows in ((1, [1] * 10), (47, [2, 2, 2, 2, 2]), (10**6, [4, 4, 2])):
        monkeypatch.setitem(fitness.FORWARD_TOKENS, "cpu", most)
        shapes.clear()
        assert score(subnet)["nll"] == pytest.approx(whole, rel=1e-6)
        assert shapes == [(n, 16) for n in rows]


def test_contiguous_runs_are_not_copied_to_score_them():
    model = super_network(PYTHIA)
    ours = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    for n_embd, is_view in ((20, True), ("5-24", True), ("1-9,11-20", False)):
        with model.running(SubNet(model.config, n_embd=n_embd), materialize=True):
            head = model._running.weights["lm_head.weight"]
            assert (head.untyped_storage().data_ptr() in ours) == is_view and not head.requires_grad


def test_copies_beyond_a_limit_are_made_for_every_batch(monkeypatch):
    model = super_network(PYTHIA)
    subnet = SubNet(model.config, n_embd="1-9,11-20", intermediate_size="1-11,13-20")
    score = Perplexity(model, fixed_batches(loader(), 3, 16))
    expected = score(subnet)
    (head,) = (take.numel() * 4 for name, take in plan(model.config, subnet).items() if name == "lm_head.weight")
    blocks = [model.transformer.h[layer] for layer in subnet.layers]
    for limit, kept in ((0, False), (head + 200, False), (10**9, True)):
        monkeypatch.setitem(supergpt.KEPT_BYTES, "cpu", limit)
        with model.running(subnet, materialize=True):
            assert (model._running.weights is not None) == (limit > head)
            assert all((block._running.weights is not None) == kept for block in blocks)
        assert score(subnet) == expected


@pytest.mark.parametrize("name", ["Gemma-2-2b", "Qwen3-30B-A3B", "OLMo-2-1124-7B", "phi-2"])
@pytest.mark.parametrize("kind", [Perplexity, KLDivergence, RepairedPerplexity])
def test_intact_leading_layers_are_run_once_for_all_candidates(name, kind, monkeypatch):
    """A candidate that starts at the teacher's activations scores as one that starts at the tokens."""
    config = ARCHITECTURES[name]
    model = super_network(config)
    more = {"calibration": torch.cat(loader((16,), 24))} if kind is RepairedPerplexity else {}
    scorer = kind(model, fixed_batches(loader(), 9, 24), **more)
    subnets = [
        SubNet(model.config, n_query_groups=[None] * 2 + [1] + [None] * (config.n_layer - 3)),
        SubNet(model.config, n_layer=f"0-{config.n_layer - 2}"),
        SubNet.full(model.config),
        SubNet(model.config, n_layer="0-1,3"),
    ]
    assert [subnet.n_intact for subnet in subnets] == [2, config.n_layer - 2, config.n_layer, 1]
    from_tokens = [scorer.losses(subnet, slice(0, None)).sums for subnet in subnets]
    n_runs = []
    first = model.transformer.h[0]
    first.register_forward_pre_hook(lambda *_: n_runs.append(1))
    for subnet, sums in zip(subnets, from_tokens):
        torch.testing.assert_close(scorer.losses(subnet).sums, sums, rtol=1e-9, atol=0)
    assert len(n_runs) == 2 * 3  # the activations of three batches, computed once, and again for the last candidate
