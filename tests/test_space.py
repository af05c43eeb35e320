"""Test search spaces: candidates always lie in their bin, in all four spaces, and cover it."""

import dataclasses
import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.config import Config
from litgpt.utils import num_parameters

from litgpt_whittle.errors import UserError
from litgpt_whittle.families import (
    FAMILIES,
    family_name,
)
from litgpt_whittle.hf.padded import fit_heads
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.spaces.args import (
    SizeArgs,
    SpaceArgs,
)
from litgpt_whittle.spaces.bins import Bin, parse_bins, short
from litgpt_whittle.spaces.draw import draw_sizes
from litgpt_whittle.spaces.drops import check_reachable, nearest
from litgpt_whittle.spaces.sizes import EVERY, SizeSpace, decided
from litgpt_whittle.spaces.space import Space, SpaceName
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import student_model
from litgpt_whittle.testing.inputs import random_ranking

PYTHIA = Config.from_name("pythia-14m", n_layer=4, n_embd=32, n_head=4, intermediate_size=64, block_size=32)
# 2 layers * 4 channels * 2 heads * 6 neurons per layer: few enough to count all
TINY = Config.from_name(
    "pythia-14m", n_layer=2, n_embd=4, n_head=2, head_size=4, intermediate_size=6, block_size=8, padded_vocab_size=16
)
SPACES = get_args(SpaceName)
FREE = SpaceArgs(fixed=[])


def whole(teacher: Config, args: SpaceArgs = SpaceArgs()) -> Bin:
    """Return the bin from the smallest size to the teacher's."""
    sizes = SizeSpace(teacher, True, False, args)
    return Bin(sizes.smallest, sizes.largest)


@pytest.mark.parametrize(
    ("text", "lo", "hi"),
    [
        ("385M-426M", 385_000_000, 426_000_000),
        ("385-426M", 385_000_000, 426_000_000),
        ("0.96b - 1.06B", 960_000_000, 1_060_000_000),
        ("410M±5%", 389_500_000, 430_500_000),
        ("410M+-5%", 389_500_000, 430_500_000),
        ("410M", 389_500_000, 430_500_000),
        ("410M ± 20M", 390_000_000, 430_000_000),
        ("1000±0.15%", 999, 1001),
        ("2.5k±0", 2500, 2500),
        (1000, 950, 1050),
        (2e6, 1_900_000, 2_100_000),
        ("3-3", 3, 3),
    ],
)
def test_bins_are_read(text, lo, hi):
    assert Bin.parse(text) == Bin(lo, hi)


@given(st.integers(1, 10**11), st.integers(0, 10**11))
def test_bins_survive_their_names(lo, width):
    assert Bin.parse(str(Bin(lo, lo + width))) == Bin(lo, lo + width)


@pytest.mark.parametrize("text", ["", "big", "410X", "410M±", "-5M", "410M±5%-6%", "1-2-3", "5%", "410M±5M%"])
def test_unreadable_bins_are_refused(text):
    with pytest.raises(UserError, match="a bin looks like"):
        Bin.parse(text)


def test_reversed_repeated_and_missing_bins_are_refused():
    with pytest.raises(UserError, match="swap"):
        Bin.parse("426M-385M")
    with pytest.raises(UserError, match="twice"):
        parse_bins("410M,1B,410M±5%")
    with pytest.raises(UserError, match="at least one bin"):
        parse_bins([])
    with pytest.raises(UserError, match="1 or more"):
        Bin.parse("0-0")
    for text, culprit in (("500,000", "'000'"), (0.3, "'0.3'")):
        with pytest.raises(UserError, match=f"a bin counts parameters, .*, got {culprit}; .*commas separate several"):
            parse_bins(text)
    assert parse_bins("410M±5%, 1B") == parse_bins(["410M", 1_000_000_000])
    assert [short(n) for n in (999, 2700, 410_000_000, 6_857_302_016)] == ["999", "2.7K", "410M", "6857302016"]


@pytest.mark.parametrize("teacher", ARCHITECTURES.values(), ids=ARCHITECTURES)
@settings(max_examples=8)
@given(data=st.data())
def test_candidates_of_every_architecture_lie_in_their_bin(teacher, data):
    name = data.draw(st.sampled_from(SPACES))
    tied = data.draw(st.booleans())
    sizes = SizeSpace(teacher, name.endswith("layerwise"), tied, FREE)
    assert sizes.largest == n_params(teacher, SubNet.full(teacher), tied)
    # any sizes from the smallest to the full teacher
    lo = data.draw(st.integers(sizes.smallest, sizes.largest))
    bin = Bin(lo, max(lo + lo // 20, lo + 200)) if data.draw(st.booleans()) else Bin(sizes.smallest, lo)
    space = Space(teacher, name, bin, tied, FREE)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    mother, father = space.sample(rng), space.sample(rng)
    children = [space.mutate(rng, mother, 0.2), space.crossover(rng, mother, father)]
    for subnet in (mother, father, *children, space.mutate(rng, children[1], 0.9)):
        assert n_params(teacher, subnet, tied) in bin
        assert SubNet.from_dict(teacher, subnet.to_dict()) == subnet
        if name.startswith("coarse"):
            keeps = [keep for i in range(len(subnet)) for keep in vars(subnet.layer(i)).values() if keep is not None]
            assert all(keep.is_prefix for keep in (subnet.n_embd, *keeps))
        if name.endswith("uniform"):
            assert subnet.is_uniform
    with torch.device("meta"):
        model = student_model(mother)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    assert num_parameters(model) == n_params(teacher, mother, tied)


# architectures whose heads must fill the channels, as the teacher's do
SHARED = {name: config for name, config in ARCHITECTURES.items() if not FAMILIES[family_name(config)].free_heads}
SHARED = {name: dataclasses.replace(config, n_embd=64) for name, config in SHARED.items()}
CONVERTIBLE = [SpaceArgs(fixed=fixed, convertible=True) for fixed in (["head_size"], ["n_embd"], [])]
CONVERTIBLE.append(SpaceArgs(SizeArgs(n_embd=8, n_query_groups=3), SizeArgs(heads_per_group=2), [], convertible=True))


def assert_convertible(subnet: SubNet) -> None:
    """Assert that the saved heads fill the channels: neither litgpt's converter nor the export needs to change them."""
    config = subnet.config
    assert config.n_head * config.head_size == config.n_embd == len(subnet.n_embd)
    assert fit_heads(config, FAMILIES[family_name(config)]) == SubNet.full(config)
    for i in range(len(subnet)):
        own = subnet.layer_config(i)
        assert own.n_query_groups <= config.n_query_groups
        assert own.n_head // own.n_query_groups <= config.n_head // config.n_query_groups


@pytest.mark.parametrize("teacher", SHARED.values(), ids=SHARED)
@settings(max_examples=12)
@given(data=st.data())
def test_candidates_of_a_convertible_space_lie_in_their_bin_and_are_convertible(teacher, data):
    name, args = data.draw(st.sampled_from(SPACES)), data.draw(st.sampled_from(CONVERTIBLE))
    if teacher.n_head == teacher.n_query_groups:
        args = dataclasses.replace(args, smallest=SizeArgs())
    sizes = SizeSpace(teacher, name.endswith("layerwise"), False, args)
    assert sizes.largest == n_params(teacher, SubNet.full(teacher))
    lo = data.draw(st.integers(sizes.smallest, sizes.largest))
    hi = sizes.largest if data.draw(st.booleans()) else lo + max(lo // 10, 800)
    space = Space(teacher, name, Bin(lo, hi), args=args)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    mother, father = space.sample(rng), space.sample(rng)
    child = space.crossover(rng, mother, father)
    for subnet in (mother, father, child, space.mutate(rng, mother, 0.5), space.trade(rng, child)):
        assert n_params(teacher, subnet) in space.bin
        assert_convertible(subnet)


def test_a_search_is_convertible_where_transformers_asks_for_it_and_something_may_shrink():
    assert decided(SpaceArgs(), PYTHIA).convertible and decided(SpaceArgs(fixed=["n_embd"]), PYTHIA).convertible
    for args in (SpaceArgs(convertible=False), SpaceArgs(fixed=["head_size", "n_embd"])):
        assert decided(args, PYTHIA) == args
    for teacher in (ARCHITECTURES["Llama-3.1-8B"], TINY):  # free heads, heads larger than the channels
        assert decided(SpaceArgs(), teacher) == SpaceArgs()
    assert SizeSpace(ARCHITECTURES["Llama-3.1-8B"], True, False, SpaceArgs(convertible=True)).sharing is None


@pytest.mark.parametrize("name", SPACES)
def test_convertible_draws_cover_what_there_is(name):
    space = Space(PYTHIA, name, whole(PYTHIA), args=SpaceArgs(convertible=True))
    rng = np.random.default_rng(0)
    draws = [space.sample(rng) for _ in range(500)]
    seen = {(len(s.n_embd), len(s.layer(i).n_query_groups)) for s in draws for i in range(len(s))}
    assert seen == {(8 * n, heads) for n in range(1, 5) for heads in range(1, n + 1)}


@pytest.mark.parametrize("name", SPACES)
def test_the_smallest_and_the_largest_are_reached(name):
    sizes = SizeSpace(PYTHIA, name.endswith("layerwise"), False, FREE)
    rng = np.random.default_rng(0)
    for edge in (sizes.smallest, sizes.largest):
        space = Space(PYTHIA, name, Bin(edge, edge), args=FREE)
        subnet = space.sample(rng)
        assert space.n_params(subnet) == space.n_params(space.mutate(rng, subnet, 0.5)) == edge
    assert subnet == SubNet.full(PYTHIA)


@pytest.mark.parametrize("name", SPACES)
def test_draws_cover_every_dimension(name):
    """Every size of every dimension occurs, and each unit is kept and dropped, in each layer."""
    teacher = Config.from_name(
        "Llama-3.1-8B", n_layer=4, n_embd=12, n_head=4, n_query_groups=2, intermediate_size=10, head_size=4
    )
    space = Space(teacher, name, whole(teacher, FREE), args=FREE)
    rng = np.random.default_rng(0)
    draws = [space.sample(rng) for _ in range(1500)]
    assert {len(s.n_embd) for s in draws} == set(range(1, 13))
    assert {len(s.head_size) for s in draws} == {2, 4}
    assert {s.layers for s in draws} == {c for n in range(1, 5) for c in itertools.combinations(range(4), n)}
    for layer in range(4):
        own = [s.layer(s.layers.index(layer)) for s in draws if layer in s.layers]
        assert {len(keep.n_query_groups) for keep in own} == {1, 2}
        assert {len(keep.heads_per_group) for keep in own} == {1, 2}
        assert {len(keep.intermediate_size) for keep in own} == set(range(1, 11))
        if space.is_fine:
            kept = np.array(
                [
                    np.isin(np.arange(10), keep.intermediate_size.indices)
                    for keep in own
                    if len(keep.intermediate_size) < 10
                ]
            )
            assert kept.any(0).all() and (~kept).any(0).all()
    if space.is_fine:
        assert {s.n_embd.indices.tobytes() for s in draws if len(s.n_embd) == 1} == {
            np.array([i]).tobytes() for i in range(12)
        }


def brute_force(teacher: Config, layerwise: bool, convertible: bool = False) -> dict[int, int]:
    """Return the number of sub-networks per parameter count, by counting each."""
    grid = [range(1, teacher.n_embd + 1), [1, 2, 4] if convertible else [4], range(1, 3), range(1, 3), range(1, 7)]
    counts: dict[int, int] = {}
    for n_embd, head_size, depth in itertools.product(*grid[:3]):
        most = n_embd // head_size if convertible else 2
        if convertible and n_embd % teacher.head_size:
            continue
        layer = list(itertools.product([n for n in grid[3] if n <= most], grid[4]))
        combos = itertools.product(layer, repeat=depth) if layerwise else ((one,) * depth for one in layer)
        for combo in combos:
            heads, widths = [h for h, _ in combo], [w for _, w in combo]
            n = n_params(
                teacher,
                SubNet(
                    teacher, n_embd=n_embd, n_layer=depth, n_query_groups=heads, intermediate_size=widths,
                    head_size=head_size,
                ),
            )  # fmt: skip
            counts[n] = counts.get(n, 0) + 1
    return counts


@pytest.fixture(
    scope="module",
    params=itertools.product([False, True], repeat=2),
    ids=["uniform", "convertible_uniform", "layerwise", "convertible_layerwise"],
)
def tiny(request):
    layerwise, convertible = request.param
    if not convertible:
        return SizeSpace(TINY, layerwise, False, SpaceArgs()), sorted(brute_force(TINY, layerwise))
    teacher, args = dataclasses.replace(TINY, n_embd=8), SpaceArgs(fixed=[], convertible=True)
    return SizeSpace(teacher, layerwise, False, args), sorted(brute_force(teacher, layerwise, True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_bin_is_reachable_exactly_when_something_is_in_it(tiny, data):
    sizes, counts = tiny
    lo = data.draw(st.integers(1, counts[-1] + 20))
    bin = Bin(lo, lo + data.draw(st.integers(0, 4)))
    inside = [n for n in counts if n in bin]
    drawn = draw_sizes(sizes, np.random.default_rng(lo), bin)
    assert (drawn is not None) == bool(inside)
    if inside:
        assert sizes.count(drawn) in inside
        return
    below, above = (
        max((n for n in counts if n < lo), default=None),
        min((n for n in counts if n > bin.hi), default=None),
    )
    assert nearest(sizes, bin) == (below, above)
    with pytest.raises(UserError, match="no sub-network lies in the bin") as error:
        check_reachable(sizes, bin)
    assert all(f"{n:,}" in str(error.value) for n in (below, above) if n is not None)


def test_every_count_of_a_tiny_space_is_drawn(tiny):
    sizes, counts = tiny
    rng = np.random.default_rng(0)
    for n in counts:
        assert sizes.count(draw_sizes(sizes, rng, Bin(n, n))) == n


@pytest.mark.parametrize("name", SPACES)
def test_the_same_seed_gives_the_same_candidates(name):
    space = Space(PYTHIA, name, Bin(20_000, 30_000) if whole(PYTHIA).lo < 20_000 else Bin.parse("2M"))

    def family(seed: int) -> list[SubNet]:
        rng = np.random.default_rng(seed)
        parents = [space.sample(rng), space.sample(rng)]
        return [*parents, space.mutate(rng, parents[0], 0.3), space.crossover(rng, *parents)]

    assert family(3) == family(3) != family(4)


@pytest.mark.parametrize("name", SPACES)
def test_mutation_changes_a_little_and_crossover_mixes(name):
    space = Space(PYTHIA, name, whole(PYTHIA))
    rng, n_changed = np.random.default_rng(0), []
    for _ in range(20):
        mother, father = space.sample(rng), space.sample(rng)
        child = space.mutate(rng, mother, 0.0)
        ours, theirs = space.sizes_of(mother), space.sizes_of(child)
        changed = [key for key in ours.values if key in theirs.values and ours.values[key] != theirs.values[key]]
        n_changed.append(len(changed))
        assert len(set(mother.layers) ^ set(child.layers)) <= 2
        mixed = space.crossover(rng, mother, father)
        assert len(mixed.n_embd) in (len(mother.n_embd), len(father.n_embd))
        assert set(mother.layers) & set(father.layers) <= set(mixed.layers) <= set(mother.layers) | set(father.layers)
    # in a bin this wide no other size must compensate; occasionally two sizes are chosen
    assert np.median(n_changed) <= 1 and max(n_changed) <= 2
    children = {space.mutate(rng, mother, 0.2) for _ in range(20)}
    assert len(children) > 10  # of 20; a coarse uniform space has few neighbours


@pytest.mark.parametrize("teacher", KINDS.values(), ids=KINDS)
@settings(max_examples=8)
@given(data=st.data())
def test_trades_stay_in_the_bin(teacher, data):
    name = data.draw(st.sampled_from(SPACES))
    sizes = SizeSpace(teacher, name.endswith("layerwise"), False, FREE)
    lo = data.draw(st.integers(sizes.smallest, sizes.largest))
    space = Space(teacher, name, Bin(lo, max(lo + lo // 20, lo + 200)), args=FREE)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    subnet = space.sample(rng)
    for _ in range(5):
        subnet = space.trade(rng, subnet)
        assert n_params(teacher, subnet) in space.bin


@pytest.mark.parametrize("bin", ["2M±5%", "1M-2.8M"])
@pytest.mark.parametrize("name", SPACES)
def test_trades_change_something_and_keep_the_count_near(name, bin):
    space, rng = Space(PYTHIA, name, Bin.parse(bin)), np.random.default_rng(0)
    n_changed, kinds = 0, set()
    for _ in range(40):
        parent = space.sample(rng)
        child = space.trade(rng, parent)
        n_changed += child != parent
        assert abs(space.n_params(child) - space.n_params(parent)) <= (space.bin.hi - space.bin.lo) / 10
        ours, theirs = space.sizes_of(parent), space.sizes_of(child)
        kinds.add("layers" if ours.layers != theirs.layers else "size" if ours != theirs else "units")
    assert n_changed > 35 and kinds >= ({"layers", "size", "units"} if space.is_fine else {"layers", "size"})


def test_a_trade_in_steps_too_coarse_to_come_near_stays_in_the_bin():
    args = SpaceArgs(fixed=["n_embd", "head_size", "n_query_groups", "intermediate_size"])
    space, rng = Space(PYTHIA, "coarse_uniform", whole(PYTHIA, args), args=args), np.random.default_rng(0)
    counts = {space.n_params(space.trade(rng, space.sample(rng))) for _ in range(50)}
    assert counts == {n_params(PYTHIA, SubNet(PYTHIA, n_layer=n)) for n in range(1, 5)}


@pytest.mark.parametrize("name", SPACES[:2])
def test_parts_of_a_space_cover_its_bin_once(name):
    sizes = SizeSpace(TINY, name.endswith("layerwise"), False, SpaceArgs())
    counts = sorted(brute_force(TINY, name.endswith("layerwise")))
    for n, bin in [(1, Bin(1, 10**6)), (3, Bin(counts[1], counts[-2])), (10, Bin(1, 10**6)), (50, Bin(counts[0], 700))]:
        parts = [part.bin for part in Space(TINY, name, bin).split(n)]
        lo, hi = max(bin.lo, sizes.smallest), min(bin.hi, sizes.largest)
        assert len(parts) <= n and all(lo <= part.lo <= part.hi <= hi for part in parts)
        assert all(one.hi < other.lo for one, other in zip(parts, parts[1:]))
        widths = [part.hi - part.lo for part in parts]
        assert max(widths) - min(widths) <= 1 and widths[0] <= (hi + 1 - lo) / n
        # only parts without any sub-network are left out
        assert [sum(count in part for part in parts) for count in counts] == [int(count in bin) for count in counts]


def test_parts_share_all_but_the_bin():
    space, rng = Space(PYTHIA, "fine_layerwise", whole(PYTHIA)), np.random.default_rng(0)
    for part in space.split(4):
        assert space.n_params(part.sample(rng)) in part.bin and part.sizes is space.sizes
    assert space.bin == whole(PYTHIA)


def test_a_space_whose_parts_seem_empty_is_one_part(monkeypatch):
    space = Space(PYTHIA, "coarse_uniform", whole(PYTHIA))
    monkeypatch.setattr("litgpt_whittle.spaces.space.draw", lambda *_: None)
    assert space.split(5) == [space]


def test_fine_mutation_keeps_most_units():
    space = Space(PYTHIA, "fine_layerwise", whole(PYTHIA))
    rng = np.random.default_rng(1)
    mother = next(s for s in (space.sample(rng) for _ in range(100)) if 10 < len(s.n_embd) < 25)
    shared = [
        len(np.intersect1d(space.mutate(rng, mother, 0.1).n_embd.indices, mother.n_embd.indices)) for _ in range(30)
    ]
    assert np.median(shared) == len(mother.n_embd)


@pytest.mark.parametrize(
    "name, n_embd, intermediate_size",
    [("SmolLM2-135M", 32, 64), ("pythia-410m", 64, 64), ("Llama-3.1-8B", 128, 128), ("pythia-14m", 1, 1)],
)
def test_widths_of_large_teachers_suit_matrix_units(name, n_embd, intermediate_size):
    teacher = Config.from_name(name)
    space, rng = Space(teacher, "fine_layerwise"), np.random.default_rng(0)
    for _ in range(5):
        subnet = space.sample(rng)
        assert len(subnet.n_embd) % n_embd == 0
        assert all(len(subnet.layer(i).intermediate_size) % intermediate_size == 0 for i in range(len(subnet)))
    grids = space.sizes.grids
    assert len(grids["n_embd"]) == teacher.n_embd // n_embd >= 16
    assert len(grids["intermediate_size"]) == teacher.intermediate_size // intermediate_size >= 16
    of_one = Space(teacher, "fine_uniform", args=SpaceArgs(SizeArgs())).sizes
    assert len(of_one.grids["intermediate_size"]) == teacher.intermediate_size


def test_steps_smallest_and_fixed_sizes_are_kept_to():
    args = SpaceArgs(
        step=SizeArgs(n_embd=5, intermediate_size=16),
        smallest=SizeArgs(n_embd=11, n_layer=2, intermediate_size=20),
        fixed=["head_size", "n_query_groups"],
        layers="first",
    )
    space = Space(PYTHIA, "coarse_layerwise", whole(PYTHIA, args), args=args)
    rng = np.random.default_rng(0)
    draws = [space.sample(rng) for _ in range(200)]
    assert {len(s.n_embd) for s in draws} == {15, 20, 25, 30, 32}
    assert {s.layers for s in draws} == {(0, 1), (0, 1, 2), (0, 1, 2, 3)}
    assert {n for s in draws for i in range(len(s)) for n in s.layer(i).sizes[:1]} == {4}
    assert {s.layer(i).sizes[2] for s in draws for i in range(len(s))} == {32, 48, 64}
    assert space.sizes.grids["head_size"] == [8] and ("head_size", EVERY) in space.sizes_of(draws[0]).values


@pytest.mark.parametrize("teacher", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", SPACES[:2])
def test_coarse_spaces_keep_the_best_units_of_an_order(teacher, name):
    order, rng = random_ranking(teacher).order, np.random.default_rng(0)
    args = SpaceArgs(fixed=["head_size"], layers="best")
    space = Space(teacher, name, whole(teacher, args), args=args, order=order)
    mother, father = space.sample(rng), space.sample(rng)
    for subnet in (mother, father, space.mutate(rng, mother, 0.3), space.crossover(rng, mother, father)):
        assert subnet.layers == tuple(sorted(order.n_layer[: len(subnet)]))
        assert subnet.n_embd == order.best("n_embd", 0, len(subnet.n_embd))
        for i, layer in enumerate(subnet.layers):
            for kind, keep in space._own(subnet, i).items():
                assert keep == order.best(kind, layer, len(keep))
        assert n_params(teacher, subnet) in space.bin
        assert name != "coarse_uniform" or subnet.is_uniform


def test_an_order_changes_which_units_are_kept_and_nothing_else():
    given, ranked = (
        Space(PYTHIA, "coarse_layerwise", whole(PYTHIA), order=order) for order in (None, random_ranking(PYTHIA).order)
    )
    one, two = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(20):
        ours, theirs = given.sample(one), ranked.sample(two)
        assert given.sizes_of(ours) == ranked.sizes_of(theirs)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (SpaceArgs(step=SizeArgs(n_embd=0)), "step.n_embd must be at least 1"),
        (SpaceArgs(smallest=SizeArgs(n_layer=5)), "smallest.n_layer must be at most the teacher's 4"),
        (SpaceArgs(fixed=["n_head"]), "search_space.fixed must contain only dimensions"),
        (SpaceArgs(layers="last"), "'any', 'first' or 'best'"),
        (SpaceArgs(layers="best"), "'best' needs --order importance"),
        (SpaceArgs(convertible=True), "convertible needs a teacher with n_embd = n_head . head_size, got 40, 4 and 8"),
    ],
)
def test_wrong_space_settings_are_refused(args, message):
    teacher = dataclasses.replace(PYTHIA, n_embd=40) if args.convertible else PYTHIA
    with pytest.raises(UserError, match=message):
        Space(teacher, "coarse_uniform", Bin(1, 10**9), args=args)


def test_an_unknown_space_and_a_bin_beyond_the_teacher_are_refused():
    with pytest.raises(UserError, match="space must be one of coarse_uniform"):
        Space(PYTHIA, "coarse", Bin(1, 10**9))
    with pytest.raises(UserError, match="the teacher has"):
        Space(PYTHIA, "coarse_uniform", Bin.parse("7B"))


def test_large_teachers_are_counted_and_drawn_without_a_model(monkeypatch):
    """The full shape of Pythia-6.9B, in the paper's first bin."""
    from litgpt.model import GPT

    monkeypatch.setattr(GPT, "__init__", lambda *_: pytest.fail("a model was built"))
    teacher = Config.from_name("pythia-6.9b")
    space = Space(teacher, "fine_layerwise", Bin.parse("410M±1%"))
    rng = np.random.default_rng(0)
    mother = space.sample(rng)
    for subnet in (mother, space.mutate(rng, mother, 0.1), space.crossover(rng, mother, space.sample(rng))):
        assert n_params(teacher, subnet) in space.bin
