"""Test searches that may drop the attention or the MLP of layers: candidates, starts, strategies, a whole search."""

from functools import cache

import numpy as np
import pytest
import test_search
import torch
from architectures import ARCHITECTURES, KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_repair import model, windows
from test_search import make_checkpoint, run

from litgpt_whittle.commands import extract
from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import SUBLAYERS, n_params
from litgpt_whittle.journal import read_journal
from litgpt_whittle.ranking.quick import quick_order
from litgpt_whittle.spaces.alternatives import Alternative
from litgpt_whittle.spaces.args import SpaceArgs
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.spaces.starts import simple_starts
from litgpt_whittle.strategies import IntegerProgram
from litgpt_whittle.strategies.choices import Choices
from litgpt_whittle.subnet import SubNet

_without_pictures = test_search._without_pictures
ALL = ["layer", "attention", "mlp"]
SPACES = ["coarse_uniform", "fine_layerwise"]
SIZES = ["head_size", "n_embd", "n_query_groups", "heads_per_group", "intermediate_size"]
LLAMA = ARCHITECTURES["Llama-3.1-8B"]


@cache
def space(name: str, kind: str, *drop: str, fixed: tuple[str, ...] = ("head_size",), lo=0.6, hi=0.8) -> Space:
    teacher = ARCHITECTURES[name]
    whole = n_params(teacher, SubNet.full(teacher))
    return Space(teacher, kind, Bin(int(lo * whole), int(hi * whole)), args=SpaceArgs(drop=[*drop], fixed=[*fixed]))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", SPACES)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_candidates_are_in_the_bin_and_drop_sub_layers(name, kind, seed):
    of, rng = space(name, kind, *ALL), np.random.default_rng(seed)
    parents = [of.sample(rng) for _ in range(12)]
    children = [of.mutate(rng, parents[0], 0.3), of.crossover(rng, *parents[:2]), of.trade(rng, parents[2])]
    for subnet in (*parents, *children, of.near(rng, of.sizes_of(parents[3]), parents[3])):
        assert of.n_params(subnet) in of.bin
        assert of.sizes.count(of.sizes_of(subnet)) == of.n_params(subnet)
        choices = Choices(of)
        numbers = choices.of(subnet)
        assert choices.of(choices.build(rng, numbers, subnet)) == numbers
    assert any(subnet.drops_sublayers for subnet in parents)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "phi-2", "Mixtral-8x7B-v0.1"])
def test_attention_alone_meets_a_bin(name):
    of = space(name, "coarse_uniform", "attention", fixed=(*SIZES, "n_expert"), lo=0.5, hi=0.97)
    seen = {of.sample(np.random.default_rng(seed)) for seed in range(20)}
    for subnet in seen:
        assert len(subnet) == of.teacher.n_layer and subnet.drop_mlp is None
        assert SubNet.full(of.teacher).replace(drop_attention=subnet.drop_attention) == subnet
    assert len(seen) > 3
    with pytest.raises(UserError, match="no sub-network lies in the bin"):
        space(name, "coarse_uniform", "attention", fixed=(*SIZES, "n_expert"), lo=0.1, hi=0.2)


def test_layers_stay_where_only_sub_layers_may_be_dropped():
    of = space("Llama-3.1-8B", "fine_layerwise", "mlp")
    assert all(len(of.sample(np.random.default_rng(seed))) == 4 for seed in range(10))


def test_what_cannot_be_dropped_is_refused():
    with pytest.raises(UserError, match="search_space.drop must contain only layer, attention and mlp, got 'attn'"):
        Space(LLAMA, "coarse_uniform", args=SpaceArgs(drop=["attn"]))


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "phi-2", "Gemma-2-2b"])
@torch.no_grad()
def test_sub_layers_are_ordered_by_what_they_change(name):
    """The oracle is the residual stream before and after each sub-layer, recorded in one more forward pass."""
    teacher, ids = model(ARCHITECTURES[name], std=0.1), windows(ARCHITECTURES[name], 8)
    order = quick_order(teacher, [ids])
    found = {part: [] for part in SUBLAYERS}
    for block in teacher.transformer.h:
        seen = {}
        handles = [
            block.register_forward_hook(lambda _, x, out, seen=seen: seen.update(before=x[0], after=out)),
            block.post_attention_norm.register_forward_hook(lambda _, x, out, seen=seen: seen.update(attn=out)),
            block.post_mlp_norm.register_forward_hook(lambda _, x, out, seen=seen: seen.update(mlp=out)),
        ]
        teacher(ids)
        for handle in handles:
            handle.remove()
        for part, before in (("attn", seen["before"]), ("mlp", seen["after"] - seen["mlp"])):
            cosine = torch.nn.functional.cosine_similarity(before, before + seen[part], dim=-1)
            found[part].append(float((1 - cosine).sum()))
    assert {part: order.sublayers[part].tolist() for part in found} == {
        part: np.argsort(-np.array(own)).tolist() for part, own in found.items()
    }


def test_simple_starts_drop_the_sub_layers_that_matter_least():
    order = quick_order(model(LLAMA, std=0.1), [windows(LLAMA, 8)])
    of = space("Llama-3.1-8B", "fine_layerwise", *ALL)
    found = {start.origin: start.subnet for start in simple_starts(of, order)}
    dropped = found["attention"].drop_attention
    assert dropped is not None and set(dropped.indices) == set(order.sublayers["attn"][-len(dropped) :])
    assert found["25% by attention and neurons"].drop_attention is not None
    assert all(of.n_params(subnet) in of.bin for subnet in found.values())
    whole = {start.origin for start in simple_starts(space("Llama-3.1-8B", "fine_layerwise", "layer"), order)}
    assert whole == {origin for origin in found if "attention" not in origin and "MLPs" not in origin}


def test_names_of_alternatives_are_read_again():
    for field, text in (("drop_attention", "layer 2: attention dropped"), ("drop_mlp", "layer 2: MLP dropped")):
        assert str(Alternative(2, field, 0)) == text and Alternative.parse(text) == Alternative(2, field, 0)


@pytest.mark.parametrize("strategy", [None, IntegerProgram(shares=(0.5,))], ids=["Evolution", "IntegerProgram"])
def test_a_search_may_drop_sub_layers_and_resumes(strategy, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "teacher")
    settings_ = dict(search_space=SpaceArgs(drop=ALL), space="coarse_layerwise", bin="12K-16K", iterations=10)
    settings_ |= {} if strategy is None else {"strategy": strategy}
    run(checkpoint, tmp_path / "out", **settings_)
    recorded = [each.subnet for each in read_journal(tmp_path / "out/journal.jsonl")[1]]
    assert any(set(choice) & {"drop_attention", "drop_mlp"} for choice in recorded)
    run(checkpoint, tmp_path / "out", **settings_ | {"iterations": 12, "resume": True})
    assert [each.subnet for each in read_journal(tmp_path / "out/journal.jsonl")[1]][:10] == recorded
    extract.setup(checkpoint, tmp_path / "out" / "best.yaml", tmp_path / "student")
