"""Test repairs from moments alone: exact if nothing is lost, better than the cut for every architecture."""

import copy
import math

import pytest
import torch
from architectures import ARCHITECTURES, KINDS, sweep
from hypothesis import given
from hypothesis import strategies as st
from litgpt.config import Config
from test_repair import distance, doubled, half, model, repair, student_of, watched, windows

from litgpt_whittle.batches import Batch
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness.perplexity import Perplexity, RepairedPerplexity
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.least_squares import Moments, no_outputs
from litgpt_whittle.repair import costs
from litgpt_whittle.repair.basis import Basis
from litgpt_whittle.repair.from_moments import MomentRepair
from litgpt_whittle.repair.layer_moments import normalised
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT, extract_weights, student_model

PYTHIA = Config.from_name(
    "pythia-14m",
    n_layer=3,
    n_embd=32,
    n_head=4,
    intermediate_size=24,
    block_size=24,
    vocab_size=61,
    padded_vocab_size=64,
)
EACH = pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)


def super_gpt(teacher) -> SuperGPT:
    net = SuperGPT(teacher.config).eval().requires_grad_(False)
    net.load_state_dict(teacher.state_dict())
    if teacher.lm_head.weight is teacher.transformer.wte.weight:
        net.lm_head.weight = net.transformer.wte.weight
    return net


def cut_of(teacher, subnet):
    cut = student_model(subnet).eval().requires_grad_(False)
    cut.load_state_dict(extract_weights(teacher, subnet))
    return cut


@sweep(ARCHITECTURES)
def test_a_repaired_candidate_is_nearer_to_its_teacher_than_the_cut(config):
    teacher = model(config, std=0.1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    net = super_gpt(teacher)
    repair = MomentRepair(net, windows(config))
    fewer_channels = SubNet(config, n_embd=config.n_embd * 3 // 4)
    for subnet, factor in ((fewer_channels, 0.9), (half(config), math.inf)):
        student = repair.student(subnet)
        assert sum(p.numel() for p in student.parameters()) == n_params(config, subnet)
        assert distance(student, teacher) < factor * distance(cut_of(teacher, subnet), teacher)
    # making students leaves the teacher unchanged
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())


@sweep(ARCHITECTURES)
def test_the_whole_teacher_stays_as_it_is(config):
    teacher, idx = model(config), windows(config, 4, seed=1)
    student = MomentRepair(super_gpt(teacher), windows(config)).student(SubNet.full(config))
    off = student(idx) - teacher(idx)
    assert (off - off.mean(-1, keepdim=True)).norm() < 1e-2 * teacher(idx).norm()


@pytest.mark.parametrize("name", ["pythia-14m", "Llama-3.1-8B"])
def test_a_cut_that_loses_nothing_is_repaired_exactly(name):
    _, teacher, cut = doubled(ARCHITECTURES.get(name) or PYTHIA)
    idx = windows(teacher.config, 8, seed=1)
    student = MomentRepair(super_gpt(teacher), windows(teacher.config, 128)).student(cut)
    got, expected = (logits - logits.mean(-1, keepdim=True) for logits in (student(idx), teacher(idx)))
    assert (got - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Gemma-2-2b"])
def test_the_embedding_stands_in_for_dropped_first_layers(name):
    """Each token's embedding becomes the mean stream after those layers and itself, counted as four more tokens."""
    config = ARCHITECTURES[name]
    teacher, ids = model(config, std=0.1), windows(config)
    subnet = SubNet(config, n_layer="1-2")
    student = MomentRepair(super_gpt(teacher), ids, micro_batch_size=3).student(subnet)
    seen = []
    handle = teacher.transformer.h[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher(ids)
    handle.remove()
    stream = seen[0].double().flatten(0, 1)
    factor = math.sqrt(config.n_embd) if config.scale_embeddings else 1.0
    for token in (*ids[0, :3].tolist(), config.padded_vocab_size - 1):  # the last one never occurs
        own, n = teacher.transformer.wte.weight[token].double(), int((ids == token).sum())
        expected = (stream[ids.flatten() == token].sum(0) + 4 * factor * own) / (n + 4) / factor
        torch.testing.assert_close(student.transformer.wte.weight[token].double(), expected, rtol=1e-4, atol=1e-5)
    assert distance(student, teacher) < distance(cut_of(teacher, subnet), teacher)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "phi-2", "Gemma-2-2b"])
def test_dropped_layers_are_made_up_for_as_in_a_repair(name, tmp_path):
    """The projections before a gap approximate the teacher's stream after it, better than the cut does."""
    config = ARCHITECTURES[name]
    teacher = model(config, std=0.1)
    quick = MomentRepair(super_gpt(teacher), windows(config, 128))
    for layers in ("0-0", "0,2"):
        subnet = SubNet(config, n_layer=layers)
        full = distance(student_of(repair(teacher, subnet, tmp_path, n=128)), teacher)
        cut = distance(cut_of(teacher, subnet), teacher)
        assert distance(quick.student(subnet), teacher) < full + 0.85 * (cut - full)


def test_the_moments_of_a_gap_are_those_of_its_tokens():
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher, ids = model(config, std=0.1), windows(config)
    yz, y = MomentRepair(super_gpt(teacher), ids, micro_batch_size=3)._gap(0, ("mlp.proj",), 2, False)
    seen = watched(teacher, ids)
    z, middle = seen["transformer.h.0.mlp.proj"][0], seen["transformer.h.0.norm_2"][0]
    after, wanted = seen["transformer.h.1"][0], seen["transformer.h.2"][0]
    off = (wanted - middle) / (after.square().mean(1, keepdim=True) + config.norm_eps)
    torch.testing.assert_close(yz, off.T @ z, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(y, off.sum(0), rtol=1e-4, atol=1e-3)


def test_tied_embeddings_stay_tied():
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher = model(config, tied=True)
    student = MomentRepair(super_gpt(teacher), windows(config)).student(half(config))
    assert student.lm_head.weight is student.transformer.wte.weight
    assert distance(student, teacher) < distance(cut_of(teacher, half(config)), teacher)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6))
def test_moments_of_affine_functions_are_those_of_their_values(seed, n_in, n_out):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 4, generator=random, dtype=torch.float64)
    weight, out = (torch.randn(n, 4, generator=random, dtype=torch.float64) for n in (n_in, n_out))
    bias, out_bias = (torch.randn(n, generator=random, dtype=torch.float64) for n in (n_in, n_out))
    plain = Moments(4, 0)
    plain.add(x, no_outputs(x))
    expected = Moments(n_in, n_out)
    expected.add(x @ weight.T + bias, x @ out.T + out_bias)
    got = plain.affine(weight, bias, out, out_bias)
    for name in ("n", "z", "y", "zz", "yz"):
        torch.testing.assert_close(torch.as_tensor(getattr(got, name)), torch.as_tensor(getattr(expected, name)))


def test_a_norm_over_all_channels_is_met_exactly():
    """If no channel is cut, the moments are those of the norm's own outputs."""
    config = PYTHIA
    torch.manual_seed(0)
    norm = config.norm_class(32, eps=config.norm_eps)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(50, 32)
    standard = Moments(32, 0)
    plain = torch.nn.functional.layer_norm(x, (32,), eps=config.norm_eps)
    standard.add(plain, no_outputs(x))
    got = normalised(standard, Basis.coordinates(torch.arange(32), 32), norm, norm)
    expected = Moments(32, 32)
    expected.add(norm(x).detach(), norm(x).detach())
    torch.testing.assert_close(got.zz, expected.zz, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got.yz, expected.yz, rtol=1e-4, atol=1e-3)


def test_the_fitness_is_the_perplexity_of_the_repaired_student():
    config = ARCHITECTURES["Llama-3.1-8B"]
    net = super_gpt(model(config))
    ids = windows(config, 8, 17, seed=3)
    batches = [Batch(ids[:, :-1], ids[:, 1:])]
    fitness = RepairedPerplexity(net, batches, calibration=windows(config))
    student = fitness.repair.student(half(config))
    expected = torch.nn.functional.cross_entropy(student(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    scores = fitness(half(config))
    assert scores["nll"] == pytest.approx(float(expected), rel=1e-5)
    assert scores == fitness(half(config))  # no state leaks from one candidate to the next
    full = SubNet.full(config)
    assert fitness(full)["nll"] == pytest.approx(Perplexity(net, batches)(full)["nll"], rel=1e-2)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_teacher_in_bfloat16_is_repaired_like_one_in_float32(config):
    teacher = super_gpt(model(config, std=0.1)).bfloat16()
    exact = super_gpt(copy.deepcopy(teacher).float())
    student = MomentRepair(teacher, windows(config)).student(half(config))
    expected = MomentRepair(exact, windows(config)).student(half(config))
    assert {weight.dtype for weight in student.parameters()} == {torch.bfloat16}
    assert distance(student.float(), exact) < 1.2 * distance(expected, exact)


def test_activations_that_are_not_finite_name_their_layer():
    teacher = model(PYTHIA)
    teacher.transformer.h[1].mlp.proj.weight[0, 0] = math.inf
    with pytest.raises(UserError, match="layer 1 gives activations that are not finite"):
        MomentRepair(super_gpt(teacher), windows(PYTHIA))


def test_few_tokens_are_warned_of_and_get_a_strong_ridge():
    teacher = model(PYTHIA, std=0.1)
    with pytest.warns(UserWarning, match="48 calibration tokens are fewer than the 56 inputs"):
        repair = MomentRepair(super_gpt(teacher), windows(PYTHIA, 3))
    assert repair.ridge > MomentRepair(super_gpt(teacher), windows(PYTHIA, 4)).ridge


def test_moments_that_do_not_fit_into_memory_are_refused(monkeypatch):
    monkeypatch.setattr(costs, "free_memory", lambda *_: 10_000)
    with pytest.raises(UserError, match="keeps the moments of all layers in memory, .* MB for .* are free"):
        MomentRepair(super_gpt(model(PYTHIA)), windows(PYTHIA))
