"""Test the integer program: brute-force optimum, corrections from true scores, and bins."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from architectures import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.metrics import MEASURES, MeasureArgs
from litgpt_whittle.spaces.alternatives import DROPPED, Alternative, Alternatives, sublayer_sizes
from litgpt_whittle.spaces.args import (
    SizeArgs,
    SpaceArgs,
)
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.limits import Limits
from litgpt_whittle.spaces.sizes import EVERY
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies import Evolution, IntegerProgram, Scored
from litgpt_whittle.strategies.integer_program import WHOLE, _Posterior
from litgpt_whittle.strategies.program import Program
from litgpt_whittle.strategies.surrogate_search import with_surrogate
from litgpt_whittle.subnet import DROPS, SubNet, layer_sizes
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.testing.inputs import random_ranking
from litgpt_whittle.unit_index import UnitIndex

SHARES = (0.5, 0.25)
SMALL = dict(block_size=16, padded_vocab_size=64, vocab_size=61)
DENSE = Config.from_name("pythia-14m", n_layer=3, n_embd=32, n_head=4, intermediate_size=64, **SMALL)
GQA = Config.from_name(
    "Llama-3.2-1B", n_layer=3, n_embd=32, n_head=8, n_query_groups=2, head_size=8, intermediate_size=64, **SMALL
)
EXPERTS = Config.from_name(
    "Mixtral-8x7B-v0.1", n_layer=2, n_embd=16, n_head=4, n_query_groups=2, head_size=8, intermediate_size=24,
    n_expert=8, n_expert_per_token=2, **SMALL,
)  # fmt: skip
DROP = ["layer", "attention", "mlp"]
SPACES = {
    "dense": Space(DENSE, "coarse_layerwise"),
    "grouped": Space(GQA, "fine_layerwise"),
    "experts": Space(EXPERTS, "coarse_layerwise"),
    "uniform": Space(GQA, "coarse_uniform"),
    "uniform experts": Space(EXPERTS, "fine_uniform"),
    "first layers": Space(DENSE, "coarse_layerwise", args=SpaceArgs(layers="first")),
    "steps of layers": Space(DENSE, "coarse_layerwise", args=SpaceArgs(step=SizeArgs(n_layer=2))),
    "all layers": Space(DENSE, "coarse_layerwise", args=SpaceArgs(fixed=["head_size", "n_layer"])),
    "sub-layers": Space(GQA, "fine_layerwise", args=SpaceArgs(drop=DROP, fixed=["head_size", "heads_per_group"])),
    "sub-layers of experts": Space(EXPERTS, "coarse_layerwise", args=SpaceArgs(drop=DROP[1:], fixed=["head_size"])),
}
EACH = pytest.mark.parametrize("name", SPACES)


@cache
def everything(name: str) -> tuple[list[SubNet], np.ndarray, np.ndarray, np.ndarray]:
    """Return all combinations of a space by brute force: sub-networks, their alternatives, parameters and FLOPs."""
    space = SPACES[name]
    teacher, alternatives = space.teacher, Alternatives(space, SHARES).all
    found: dict[SubNet, list[Alternative]] = {}
    options = []
    for layer in range(teacher.n_layer):
        parts = []
        for field in DROPS:
            names = sublayer_sizes(field, layer_sizes(teacher, layer))
            grids = space.sizes.grids
            shares = {name: SHARES if len(grids[name]) > 1 else () for name in names}
            levels = [dict.fromkeys([n, *(max(int(s * n), 1) for s in shares[name])]) for name, n in names.items()]
            found_ = [dict(zip(names, sizes)) for sizes in itertools.product(*levels)]
            parts.append(found_ + ([dict.fromkeys(names, 0)] if field in Alternatives(space, SHARES).sublayers else []))
        options.append([None, *(attention | mlp for attention, mlp in itertools.product(*parts))])
    for choices in itertools.product(*options):
        layers = [layer for layer, choice in enumerate(choices) if choice]
        kept = [choice for choice in choices if choice]
        is_uniform = all(choice == kept[0] for choice in kept) if kept else False
        if len(layers) not in space.sizes.grids["n_layer"] or ("uniform" in name and not is_uniform):
            continue
        is_first = name != "first layers" or layers == list(range(len(layers)))
        if len({choice.get("n_expert") for choice in kept} - {0}) > 1 or not is_first:
            continue
        lacking = {field: [i for i in layers if not all(sublayer_sizes(field, choices[i]).values())] for field in DROPS}
        if layers in lacking.values() or set.intersection(*map(set, lacking.values())):
            continue
        fields = {size: [choice[size] or None for choice in kept] for size in kept[0]}
        fields |= {field: UnitIndex(own) for field, own in lacking.items() if own}
        subnet = SubNet(teacher, n_layer=UnitIndex(np.array(layers)), **fields)
        used = [Alternative(layer, DROPPED, 0) for layer, choice in enumerate(choices) if not choice]
        for layer in layers:
            used += [Alternative(EVERY if s == "n_expert" else layer, s, n) for s, n in choices[layer].items()]
            used += [Alternative(layer, field, 0) for field, own in lacking.items() if layer in own]
        found[subnet] = used
    weights = np.array([[each in used for each in alternatives] for used in found.values()], dtype=float)
    counts = np.array([n_params(teacher, subnet) for subnet in found])
    flops = np.array([MEASURES["flops"](teacher, subnet, MeasureArgs()) for subnet in found])
    return list(found), weights, counts, flops


def within(name: str, lo: float, hi: float) -> Space:
    """Return a space with another bin."""
    space = SPACES[name]
    return Space(space.teacher, space.name, Bin(int(lo), int(hi)), args=space.sizes.args)


def some_bin(name: str, start: float, width: float) -> tuple[float, float]:
    """Return a bin that has combinations, from one of their sizes upwards."""
    counts = np.sort(everything(name)[2])
    lo = counts[int(start * (len(counts) - 1))]
    return lo, lo + width * (counts[-1] - counts[0])


# -- the program


@EACH
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0.01, 0.5), st.booleans())
def test_the_program_finds_what_brute_force_finds(name, seed, start, width, is_limited):
    subnets, weights, counts, flops = everything(name)
    rng = np.random.default_rng(seed)
    costs = rng.normal(size=weights.shape[1]) + 0.5
    lo, hi = some_bin(name, start, width)
    inside = (counts >= lo) & (counts <= hi)
    space = within(name, lo, hi)
    if is_limited:
        most = float(np.quantile(flops[inside], 0.7))
        space.limits, inside = Limits({"flops": (0.0, most)}, space.teacher), inside & (flops <= most)
    program = Program(Alternatives(space, SHARES))
    totals = np.where(inside, weights @ costs, np.inf)
    others = []
    for expected in np.sort(totals)[:3]:
        choices = program.solve(costs, others)
        if not math.isfinite(expected):
            assert choices is None
            break
        found = program.alternatives.combined(choices)
        assert found in set(itertools.compress(subnets, inside))
        assert totals[subnets.index(found)] == pytest.approx(expected, abs=1e-5)
        others.append(choices)


@cache
def everything_between() -> tuple[list[SubNet], np.ndarray]:
    """Return all combinations of the dense teacher's heads and neurons, including sizes between the measured ones."""
    each = [None, *itertools.product((4, 2, 1), (64, 48, 32, 24, 16))]
    subnets = []
    for choices in itertools.product(each, repeat=3):
        kept = [choice for choice in choices if choice]
        if kept:
            layers = UnitIndex([layer for layer, choice in enumerate(choices) if choice])
            heads, neurons = ([choice[k] for choice in kept] for k in (0, 1))
            subnets.append(SubNet(DENSE, n_layer=layers, n_query_groups=heads, intermediate_size=neurons))
    return subnets, np.array([n_params(DENSE, subnet) for subnet in subnets])


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_neurons_between_two_measured_numbers_cost_in_proportion(seed, start):
    """The program finds the brute-force optimum, with the weights of the interpolation test below."""
    space = SPACES["dense"]
    alternatives = Alternatives(space, SHARES, n_between=1)  # 64, 48, 32, 24 and 16 neurons
    assert alternatives.offered["intermediate_size"] == [64, 48, 32, 24, 16]
    assert alternatives.offered["n_query_groups"] == alternatives.levels["n_query_groups"]
    subnets, counts = everything_between()
    costs = np.random.default_rng(seed).normal(size=len(alternatives.all)) + 0.5
    lo = int(np.quantile(counts, 0.8 * start))
    within_bin = (counts >= lo) & (counts <= lo + 500)
    totals = [alternatives.weights(subnet) @ costs for subnet in itertools.compress(subnets, within_bin)]
    space = Space(DENSE, "coarse_layerwise", Bin(lo, lo + 500))
    program = Program(Alternatives(space, SHARES, n_between=1))
    choices = program.solve(costs)
    found = program.alternatives.combined(choices)
    assert lo <= n_params(DENSE, found) <= lo + 500
    assert alternatives.weights(found) @ costs == pytest.approx(min(totals), abs=1e-5)


def test_neurons_between_two_measured_numbers_are_those_of_the_smaller_and_some_of_the_larger():
    ranking = random_ranking(DENSE, 0)
    alternatives = Alternatives(SPACES["dense"], SHARES, n_between=1)
    for each in alternatives.all:
        alternatives.note_units(each, alternatives.alone(each, ranking.order))
    choices = [{"n_query_groups": 4, "heads_per_group": 1, "intermediate_size": n} for n in (48, 24, 16)]
    subnet = alternatives.combined(choices)
    best = ranking.order.best
    assert subnet.layer(2).intermediate_size == best("intermediate_size", 2, 16)
    units = [set(subnet.layer(layer).intermediate_size.indices) for layer in range(2)]
    assert set(best("intermediate_size", 0, 32).indices) < units[0] and len(units[0]) == 48
    smaller, larger = (set(best("intermediate_size", 1, n).indices) for n in (16, 32))
    assert smaller < units[1] < larger and len(units[1]) == 24


@EACH
def test_the_alternatives_of_a_combination_are_recognised(name):
    subnets, weights, *_ = everything(name)
    alternatives = Alternatives(SPACES[name], SHARES)
    for i in np.random.default_rng(0).permutation(len(subnets))[:50]:
        assert alternatives.weights(subnets[i]).tolist() == weights[i].tolist()


def test_sizes_between_two_levels_have_a_part_of_both():
    alternatives = Alternatives(SPACES["dense"], SHARES)  # 64, 32 and 16 neurons
    weights = alternatives.weights(SubNet(DENSE, n_layer="0,2", intermediate_size=[40, 20]))
    found = {str(each): part for each, part in zip(alternatives.all, weights) if part}
    assert found == {
        "layer 0: intermediate_size 32": 0.75,
        "layer 1: dropped": 1.0,
        "layer 2: intermediate_size 32": 0.25,
        "layer 2: intermediate_size 16": 0.75,
    }
    assert alternatives.weights(SubNet(DENSE, n_embd=24)) is None


@pytest.mark.parametrize("teacher", KINDS.values(), ids=KINDS)
def test_costs_of_layers_add_up_for_every_architecture(teacher):
    """The sums over layers equal the counts of the whole combination, exactly."""
    space = Space(teacher, "coarse_layerwise")
    names = ["n_params", "flops", "kv_cache_bytes", "weight_bytes"]
    space.limits = Limits(dict.fromkeys(names, (0.0, math.inf)), teacher, MeasureArgs(8))
    program = Program(Alternatives(space, (0.75, 0.5)))
    outside, added = program._quantities(names)
    rng = np.random.default_rng(0)
    for _ in range(5):
        choices = program.solve(rng.normal(size=len(program.alternatives.all)))
        subnet, total = program.alternatives.combined(choices), outside.copy()
        for (layer, part), variables in program.parts.items():
            if choices[layer] is not None:
                total += added[variables[tuple(choices[layer][name] for name in part)]]
        assert total[0] == n_params(teacher, subnet)
        assert total.tolist() == [MEASURES[name](teacher, subnet, MeasureArgs(8)) for name in names]


# -- the strategy


def begun(name: str, score, seed: int = 1, **given) -> IntegerProgram:
    """Return a strategy in the middle third of sizes, with all measurements taken."""
    strategy = IntegerProgram(shares=SHARES, **{"n_between": 0} | given)
    strategy.start(within(name, *some_bin(name, 0.35, 0.1)), seed)
    strategy.take_measurements({key: Scored(s, score(s), {}) for key, s in strategy.measurements().items()})
    return strategy


def planted(name: str, seed: int = 0) -> tuple[dict[SubNet, float], list[SubNet]]:
    """Return scores that add up over the alternatives, for all combinations and for those in the bin."""
    subnets, weights, counts, _ = everything(name)
    costs = np.random.default_rng(seed).uniform(0.1, 1.0, weights.shape[1])
    known = dict(zip(subnets, weights @ costs + 2.0))
    lo, hi = some_bin(name, 0.35, 0.1)
    return known, [subnet for subnet, count in zip(subnets, counts) if int(lo) <= count <= int(hi)]


def run(strategy: IntegerProgram, score, n: int) -> list[float]:
    scores = []
    while len(scores) < n:
        for subnet in strategy.ask(n - len(scores)):
            scores.append(score(subnet))
            strategy.tell(subnet, scores[-1])
    return scores


@EACH
def test_planted_sums_are_found_at_the_first_evaluation(name):
    for seed in range(3):
        known, members = planted(name, seed)
        strategy = begun(name, lambda subnet, known=known: known.get(subnet) or sum_of(name, subnet, known))
        (first,) = strategy.ask(1)
        assert known[first] == pytest.approx(min(known[subnet] for subnet in members))


def sum_of(name: str, subnet: SubNet, known: dict[SubNet, float]) -> float:
    """Return the planted score of a measurement that is not in the space, such as one uneven layer of a uniform one."""
    subnets, weights, *_ = everything(name)
    costs = np.linalg.lstsq(weights, np.array([known[each] for each in subnets]) - 2.0, rcond=None)[0]
    return float(Alternatives(SPACES[name], SHARES).weights(subnet) @ costs) + 2.0


@pytest.mark.parametrize(("name", "seed"), [("dense", 0), ("grouped", 1), ("experts", 2), ("uniform", 0)])
def test_corrections_find_the_best_where_two_cuts_interact(name, seed):
    """Two cuts of the additive optimum cost twice as much together, which no measurement shows."""
    known, members = planted(name, seed)
    weights = dict(zip(everything(name)[0], everything(name)[1]))
    pair = np.flatnonzero(weights[min(members, key=known.get)])[:2]

    def score(subnet: SubNet) -> float:
        alone = known.get(subnet) or sum_of(name, subnet, known)
        return alone + (alone - 2.0) * weights.get(subnet, np.zeros(max(pair) + 1))[pair].all()

    scores = run(begun(name, score), score, 24)
    ranked = sorted(map(score, members))
    assert min(scores) < scores[0]
    assert ranked.index(min(scores)) < max(len(ranked) / 100, 1)


def test_a_cut_that_could_not_be_scored_is_avoided():
    known, _ = planted("dense")
    bad = Alternative(1, "n_query_groups", 2)

    def score(subnet: SubNet) -> float:
        return math.inf if len(subnet) == 3 and len(subnet.layer(1).n_query_groups) == 2 else known[subnet]

    strategy = begun("dense", score)
    (first,) = strategy.ask(1)
    assert strategy.alternatives.weights(first)[strategy.alternatives.index[bad]] == 0
    with pytest.raises(UserError, match="the whole teacher could not be scored"):
        begun("dense", lambda subnet: math.nan)


def test_losses_count_where_the_fitness_gives_them():
    strategy = IntegerProgram(shares=SHARES)
    strategy.start(SPACES["dense"], 1)
    losses = {name: 3.0 + 0.01 * i for i, name in enumerate(strategy.measurements())}
    subnets = strategy.measurements()
    strategy.take_measurements({k: Scored(subnets[k], math.exp(v), {"nll": v}) for k, v in losses.items()})
    assert strategy.costs == pytest.approx([0.01 * i for i in range(1, len(losses))])


def test_measured_units_are_those_of_candidates():
    space = within("grouped", *some_bin("grouped", 0.35, 0.1))
    order = random_ranking(GQA).order
    strategy = IntegerProgram(shares=SHARES, n_between=0)
    strategy.start(space, 1)
    measured = strategy.measurements(order)
    strategy.take_measurements({name: Scored(subnet, 1.0, {}) for name, subnet in measured.items()})
    for subnet in strategy.ask(4):
        for i, layer in enumerate(subnet.layers):
            keep = subnet.layer(i)
            assert keep.intermediate_size == order.best("intermediate_size", layer, len(keep.intermediate_size))
            assert keep.n_query_groups == order.best("n_query_groups", layer, len(keep.n_query_groups))


def test_corrections_are_those_of_ridge_regression():
    """Against the closed form of the penalised least-squares problem."""
    rng = np.random.default_rng(0)
    costs, weights = rng.uniform(0.5, 2, 5), (rng.random((8, 5)) < 0.5).astype(float)
    weights[:, 0] = 1
    rises = weights @ costs * rng.uniform(0.9, 1.5, 8)
    common, noise, uncertainty = 2.0, 0.05, 0.3
    design = np.hstack((weights * costs, (weights @ costs)[:, None])) / rises[:, None] / noise
    target = (rises - weights @ costs) / rises / noise
    prior = np.diag([1 / uncertainty] * 5 + [1 / common])
    shares = np.linalg.lstsq(np.vstack((design, prior)), np.concatenate((target, np.zeros(6))), rcond=None)[0]
    expected = costs * (1 + shares[-1]) + costs * shares[:-1]
    assert _Posterior(costs, weights, rises, uncertainty).mean == pytest.approx(expected)


def test_names_are_read_back():
    for name, space in SPACES.items():
        for each in Alternatives(space, SHARES).all:
            assert Alternative.parse(str(each)) == each, name
    assert Alternative.parse(WHOLE) is None


def test_what_it_cannot_search_is_refused_in_one_line():
    strategy = IntegerProgram()
    strategy.start(Space(DENSE, "coarse_layerwise", Bin(3000, 4000)), 1)  # fewer than the full embeddings have
    with pytest.raises(UserError, match="no combination of layers' alternatives in the bin 3K-4K"):
        strategy.measurements()
    with pytest.raises(UserError, match="IntegerProgram predicts by its own measurements"):
        with_surrogate(IntegerProgram(), SurrogateArgs(mode="filter"), DENSE)
    assert with_surrogate(Evolution(), SurrogateArgs(mode="filter"), DENSE)[1]
    for shares in ((), (1.0,), (0.5, "x")):
        with pytest.raises(UserError, match=r"strategy\.shares must be one or more numbers between 0 and 1"):
            IntegerProgram(shares=shares)
    with pytest.raises(UserError, match=r"strategy\.uncertainty must be more than 0"):
        IntegerProgram(uncertainty=0)
