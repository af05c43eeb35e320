"""Test reordered teachers: they compute the same, and their prefixes are the original's best units."""

import copy
import pickle

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import plan
from litgpt_whittle.ranking.order import Order, reorder
from litgpt_whittle.subnet import SubNet, layer_sizes
from litgpt_whittle.supergpt import extract_weights, student_model
from litgpt_whittle.testing.inputs import random_ranking
from litgpt_whittle.unit_index import Ordered, UnitIndex

EACH = pytest.mark.parametrize("teacher", ARCHITECTURES.values(), ids=ARCHITECTURES)


def model(config: Config, tied: bool = False, std: float = 0.1) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(config).eval().requires_grad_(False)
    for name, tensor in gpt.state_dict().items():
        torch.nn.init.normal_(tensor, mean=1.0 if "norm" in name or "ln_f" in name else 0.0, std=std)
    if tied:
        gpt.lm_head.weight = gpt.transformer.wte.weight
    return gpt


def loaded(config: Config, weights: dict) -> GPT:
    gpt = GPT(config).eval().requires_grad_(False)
    gpt.load_state_dict(weights)
    return gpt


def tokens(config: Config) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))


@EACH
@pytest.mark.parametrize("tied", [False, True])
def test_the_order_of_units_does_not_change_the_logits(teacher, tied):
    gpt, idx, order = model(teacher, tied), tokens(teacher), random_ranking(teacher).order
    weights = reorder(gpt, order)
    assert (weights["lm_head.weight"] is weights["transformer.wte.weight"]) is tied
    expected, got = gpt(idx), loaded(teacher, weights)(idx)
    # litgpt's RMSNorm and router always compute in fp32, so the tolerance is fp32's own rounding
    rounding = (copy.deepcopy(gpt).double()(idx) - expected).abs().max().item()
    scale = expected.abs().max().item()
    assert rounding < 1e-5 * scale
    torch.testing.assert_close(got, expected, rtol=0, atol=4 * rounding + 1e-6 * scale)


@EACH
def test_an_order_moves_every_weight_that_it_can_and_loses_none(teacher):
    rising = tuple(
        {name: np.arange(size) for name, size in layer_sizes(teacher, i).items()} for i in range(teacher.n_layer)
    )
    gpt, order = model(teacher), Order.by(teacher, np.arange(teacher.n_embd), np.arange(teacher.n_layer), rising)
    before, after = gpt.state_dict(), reorder(gpt, order)
    slices = plan(teacher, order.reordered)
    assert set(slices) == set(before)
    for name, tensor in after.items():
        assert torch.equal(tensor.flatten().sort().values, before[slices[name].name].flatten().sort().values)
        is_moved = not torch.equal(tensor, before[name])
        # nothing is reordered within a head, because rotary dimensions have fixed positions
        own_place = ("attn.norm_q", "attn.norm_k") if teacher.norm_qk_type == "default" else ()
        own_place += ("attn.q_a_norm", "attn.kv_a_norm", "lm_head.bias")
        assert is_moved or any(part in name for part in own_place), name


@EACH
def test_a_prefix_of_the_reordered_teacher_has_the_best_units(teacher):
    gpt, idx, order = model(teacher), tokens(teacher), random_ranking(teacher).order
    prefixes, best = {}, {}
    for layer in range(teacher.n_layer):
        for name, size in layer_sizes(teacher, layer).items():
            n = max(size // 2, 1) if name != "n_expert" else max(size // 2, 4)
            prefixes.setdefault(name, [None] * teacher.n_layer)[layer] = n
            best.setdefault(name, [None] * teacher.n_layer)[layer] = order.best(name, layer, n)
    reordered = loaded(teacher, reorder(gpt, order))
    prefix = SubNet(teacher, n_embd=20, **prefixes)
    chosen = SubNet(teacher, n_embd=order.best("n_embd", 0, 20), **best)
    assert chosen == SubNet.from_dict(teacher, chosen.to_dict())
    ours, theirs = student_model(chosen), student_model(prefix)
    ours.load_state_dict(extract_weights(gpt, chosen))
    theirs.load_state_dict(extract_weights(reordered, prefix))
    with torch.no_grad():
        expected = theirs(idx)
        torch.testing.assert_close(ours(idx), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_the_best_come_first_and_the_first_of_equals():
    teacher = ARCHITECTURES["Llama-3.1-8B"]
    sizes = layer_sizes(teacher, 0)
    scores = tuple({name: np.zeros(size) for name, size in sizes.items()} for _ in range(teacher.n_layer))
    scores[1]["intermediate_size"][[7, 3]] = 2.0, 1.0
    order = Order.by(teacher, np.arange(teacher.n_embd), np.array([0.0, 3.0, 1.0, 3.0]), scores)
    assert order.n_embd.tolist() == list(range(teacher.n_embd))[::-1]
    assert order.n_layer.tolist() == [1, 3, 2, 0]
    assert order.layers[1]["intermediate_size"][:5].tolist() == [7, 3, 0, 1, 2]
    assert order.best("intermediate_size", 1, 3) == UnitIndex([0, 3, 7])
    assert order.best("intermediate_size", 0, 3) == UnitIndex(3)
    assert order.best("n_embd", 0, 2) == UnitIndex(np.array([teacher.n_embd - 2, teacher.n_embd - 1]))


def test_experts_stay_in_the_groups_that_the_router_chooses_between():
    teacher = ARCHITECTURES["latent"]
    order = random_ranking(teacher).order
    for units in order.layers[teacher.first_k_dense_replace :]:
        experts = units["n_expert"].reshape(teacher.n_expert_groups, -1)
        assert np.array_equal(np.sort(experts, 1), np.arange(teacher.n_expert).reshape(experts.shape))
    best = order.best("n_expert", 3, 4)
    chosen = order.layers[3]["n_expert"].reshape(2, 4)[:, :2]
    assert best == UnitIndex(np.sort(chosen.ravel()))


def test_an_order_is_no_choice_that_could_be_written_down():
    ordered = Ordered(np.array([2, 0, 1, 3]))
    assert len(ordered) == 4 and not ordered.is_prefix and ordered.largest == 3
    assert ordered != UnitIndex(4) and Ordered(np.arange(4)) == UnitIndex(4)
    assert pickle.loads(pickle.dumps(ordered)) == ordered
    with pytest.raises(UserError, match="must be sorted"):
        UnitIndex.parse(ordered.to_yaml())
