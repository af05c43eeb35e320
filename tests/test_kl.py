"""Test KL to the teacher against the plain formula on full logits in float64."""

import dataclasses

import pytest
import torch
from architectures import ARCHITECTURES
from litgpt.model import GPT
from test_fitness import PYTHIA, Largest, loader

from litgpt_whittle import registry
from litgpt_whittle.batches import fixed_batches
from litgpt_whittle.distillation import head
from litgpt_whittle.fitness.kl import KLDivergence, TaughtBatch
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT
from litgpt_whittle.testing.fitness import check_formula
from litgpt_whittle.testing.inputs import super_network


def plain(student: GPT, teacher: GPT, batches: list[TaughtBatch]) -> dict[str, float]:
    """Return the mean over all tokens that are not ignored, from full logits."""
    values = []
    for ids, targets, _ in batches:
        log_p, log_q = (net(ids).log_softmax(-1)[targets != -100] for net in (teacher, student))
        values.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return {"kl": float(torch.cat(values).mean())}


@pytest.mark.parametrize("name", ["Gemma-2-2b", "Qwen3-30B-A3B", "OLMo-2-1124-7B", "phi-2", "latent"])
def test_kl_is_the_plain_formula(name):
    check_formula(KLDivergence, plain, ARCHITECTURES[name])


@pytest.mark.parametrize("name", ["Gemma-2-2b", "Llama-3.1-8B", "pythia-14m"])
def test_the_whole_teacher_is_at_no_distance_and_all_others_are(name):
    model = super_network(ARCHITECTURES.get(name, PYTHIA))
    score = KLDivergence(model, fixed_batches(loader(), 3, 16))
    assert score(SubNet.full(model.config))["kl"] == pytest.approx(0, abs=1e-6)
    assert score(SubNet(model.config, n_layer=1))["kl"] > 0.01


def test_chunks_change_nothing(monkeypatch):
    model = super_network(dataclasses.replace(PYTHIA, block_size=96))
    batches = fixed_batches(loader((4, 3), 97), 2, 96)
    subnet = SubNet(model.config, n_embd=24, n_layer=2)
    whole = KLDivergence(model, batches)(subnet)["kl"]
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 1)  # 32 tokens, the smallest chunk
    assert KLDivergence(model, batches)(subnet)["kl"] == pytest.approx(whole, rel=1e-5)


def test_logits_of_neither_model_exist_whole(monkeypatch):
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 2**16)
    torch.manual_seed(0)
    model = SuperGPT(dataclasses.replace(PYTHIA, padded_vocab_size=2048, block_size=256)).eval()
    batches = fixed_batches(loader((4,), 257), 1, 256)
    with Largest() as largest:
        KLDivergence(model, batches)(SubNet(model.config, n_embd=24))
    n_logits = 4 * 256 * 2048
    assert 0 < largest.numel < n_logits / 8


def test_bf16_is_used_where_asked_for():
    model = super_network(PYTHIA)
    subnet, full = SubNet(model.config, n_embd=24), SubNet.full(model.config)
    batches = fixed_batches(loader(), 3, 16)
    exact = KLDivergence(model, batches)(subnet)["kl"]
    mixed = KLDivergence(model, batches, autocast=lambda: torch.autocast("cpu", torch.bfloat16))(subnet)["kl"]
    true = KLDivergence(model.bfloat16(), batches)
    assert true.batches[0].hidden.dtype == torch.bfloat16
    for rough in (mixed, true(subnet)["kl"]):
        assert rough != exact and rough == pytest.approx(exact, rel=0.05)
    assert true(full)["kl"] == pytest.approx(0, abs=1e-6)  # both are rounded the same way


def test_it_is_found_by_its_name():
    assert registry.lookup("litgpt_whittle.fitness", "kl") is KLDivergence
