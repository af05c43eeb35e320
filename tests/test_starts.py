"""Test simple starting points of a search: legal members of their bin, treated like all candidates."""

import dataclasses
import inspect
import json
from typing import get_args

import numpy as np
import pytest
import test_search
import torch
from architectures import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.config import Config
from litgpt.utils import num_parameters
from test_racing import Listed, Windows
from test_search import Tokens, lines, make_checkpoint, run
from test_space import CONVERTIBLE, FREE, SHARED, assert_convertible
from test_strategies import GROUP, SMALL

from litgpt_whittle import registry
from litgpt_whittle.batches import BudgetArgs
from litgpt_whittle.checkpoint import weights_fingerprint
from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.journal import read_journal
from litgpt_whittle.metrics import MEASURES, MeasureArgs
from litgpt_whittle.quantities import Range
from litgpt_whittle.ranking.order import Order
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.searching.args import RacingArgs
from litgpt_whittle.searching.loop import Loop, Search
from litgpt_whittle.searching.racing_loop import RaceNotes, RacingLoop
from litgpt_whittle.spaces.args import (
    SizeArgs,
    SpaceArgs,
)
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.limits import Limits
from litgpt_whittle.spaces.space import Space, SpaceName
from litgpt_whittle.spaces.starts import Start, simple_starts
from litgpt_whittle.strategies import NSGA2, Evolution, RandomSearch
from litgpt_whittle.subnet import SubNet, layer_sizes
from litgpt_whittle.supergpt import student_model
from litgpt_whittle.testing.inputs import random_ranking

SPACES = get_args(SpaceName)
TEACHER = test_search.TEACHER
GQA = Config.from_name(
    "Llama-3.2-1B", n_layer=6, n_embd=48, n_head=6, n_query_groups=3, head_size=8, intermediate_size=96, block_size=16,
    padded_vocab_size=64, vocab_size=61,
)  # fmt: skip
checkpoint = test_search.checkpoint
_without_pictures = test_search._without_pictures


def by_origin(space: Space, *rest, **more) -> dict[str, SubNet]:
    return {start.origin: start.subnet for start in simple_starts(space, *rest, **more)}


# -- bins and spaces


def assert_member(subnet: SubNet, space: Space, args: SpaceArgs) -> None:
    """Check the definition of the space, independent of its construction."""
    teacher, name = space.teacher, space.name
    assert n_params(teacher, subnet, space.tied) in space.bin
    assert SubNet.from_dict(teacher, subnet.to_dict()) == subnet
    whole = {"n_embd": teacher.n_embd, "n_layer": teacher.n_layer, "head_size": teacher.head_size}
    sizes = [{field: len(getattr(subnet, field)) for field in whole}]
    for i, layer in enumerate(subnet.layers):
        limits, keep = layer_sizes(teacher, layer), subnet.layer(i)
        values = (keep.n_query_groups, keep.heads_per_group, keep.intermediate_size, keep.n_expert)
        sizes.append({field: len(units) for field, units in zip(limits, values) if units is not None})
        whole |= limits
    for field, n in ((field, n) for each in sizes for field, n in each.items()):
        assert n == whole[field] or (
            field not in args.fixed and n % (getattr(args.step, field) or 1) == 0 and n >= getattr(args.smallest, field)
        )
    if args.layers == "first":
        assert subnet.n_layer.is_prefix
    if name.endswith("uniform"):
        assert subnet.layers_are_alike and (args.convertible or subnet.is_uniform)
    if name.startswith("coarse"):
        keeps = [keep for i in range(len(subnet)) for keep in vars(subnet.layer(i)).values() if keep is not None]
        assert all(keep.is_prefix for keep in (subnet.n_embd, *keeps))


ARGS = (
    FREE,
    SpaceArgs(),
    SpaceArgs(layers="first"),
    SpaceArgs(SizeArgs(n_embd=4, intermediate_size=4), SizeArgs(n_layer=2, intermediate_size=3), ["head_size"]),
)


@pytest.mark.parametrize("teacher", KINDS.values(), ids=KINDS)
@settings(max_examples=8)
@given(data=st.data())
def test_starts_of_every_architecture_lie_in_their_bin_and_space(teacher, data):
    name, tied = data.draw(st.sampled_from(SPACES)), data.draw(st.booleans())
    args = data.draw(st.sampled_from(ARGS))
    whole = Space(teacher, name, tied=tied, args=args)
    hi = data.draw(st.integers(whole.sizes.smallest, whole.sizes.largest))
    try:
        space = Space(teacher, name, Bin(max(hi - hi // 10, 1), hi), tied, args)
    except UserError:  # the bin may fall into a gap between the channels' steps
        return
    order = data.draw(st.sampled_from((None, random_ranking(teacher).order)))
    starts = simple_starts(space, order, n_sizes=data.draw(st.integers(1, 2)))
    assert len({start.subnet for start in starts}) == len(starts)
    for start in starts:
        assert_member(start.subnet, space, args)
    if starts:
        with torch.device("meta"):
            model = student_model(starts[-1].subnet)
        if tied:
            model.lm_head.weight = model.transformer.wte.weight
        assert num_parameters(model) == n_params(teacher, starts[-1].subnet, tied)


@pytest.mark.parametrize("teacher", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("space", SPACES)
def test_starts_of_a_convertible_space_are_convertible(teacher, space):
    args = CONVERTIBLE[0]
    space = Space(teacher, space, Bin(1, n_params(teacher, SubNet.full(teacher)) * 2 // 3), args=args)
    starts = simple_starts(space)
    assert len(starts) > 3
    for start in starts:
        assert_member(start.subnet, space, args)
        assert_convertible(start.subnet)


@pytest.mark.parametrize("n_layer", [1, 2, 3, 5, 8])
def test_each_way_of_dropping_layers_keeps_as_many_as_it_should(n_layer):
    teacher = dataclasses.replace(GQA, n_layer=n_layer)
    for n in range(1, n_layer):
        count = n_params(teacher, SubNet(teacher, n_layer=n))
        found = by_origin(Space(teacher, "fine_uniform", Bin(count, count)), random_ranking(teacher).order)
        ways = [subnet.layers for origin, subnet in found.items() if origin.startswith("layers (")]
        assert ways and all(len(set(way)) == n for way in ways)


def test_an_idea_cuts_what_its_name_says_and_as_little_as_the_bin_demands():
    full = n_params(GQA, SubNet.full(GQA))
    space = Space(GQA, "fine_layerwise", Bin(full * 6 // 10, full * 7 // 10))
    found = by_origin(space, random_ranking(GQA).order)
    fields = {
        "neurons": {"intermediate_size"},
        "channels": {"n_embd"},
        "layers (importance)": {"n_layer"},
        "layers (evenly)": {"n_layer"},
        "layers (middle)": {"n_layer"},
        "heads and neurons": {"n_query_groups", "intermediate_size"},
        "heads within groups and neurons": {"heads_per_group", "intermediate_size"},
        "channels and neurons": {"n_embd", "intermediate_size"},
        "50% by layers (importance) and neurons": {"n_layer", "intermediate_size"},
    }
    whole = {"n_embd": 48, "n_layer": 6, "n_query_groups": 3, "heads_per_group": 2, "intermediate_size": 96}
    for origin, cut in fields.items():
        keep = found[origin].layer(0)
        own = {"n_embd": found[origin].n_embd, "n_layer": found[origin].n_layer, **vars(keep)}
        assert {field for field, n in whole.items() if len(own[field]) < n} == cut, origin
    wider = [SubNet(GQA, intermediate_size=len(found["neurons"].layer(0).intermediate_size) + 1)]
    wider += [
        SubNet(GQA, n_embd=len(found["channels"].n_embd) + 1),
        SubNet(GQA, n_layer=len(found["layers (middle)"]) + 1),
    ]
    assert all(n_params(GQA, subnet) > space.bin.hi for subnet in wider)


def test_ideas_that_cannot_meet_the_bin_are_left_out():
    full = n_params(GQA, SubNet.full(GQA))
    args = SpaceArgs(step=SizeArgs(n_embd=24), fixed=["head_size", "n_query_groups", "heads_per_group"])
    found = by_origin(Space(GQA, "fine_uniform", Bin(full - 3_000, full - 1_000), args=args))
    assert "neurons" in found and not any("heads" in name or name.startswith("channels") for name in found)
    assert not any(name.startswith("layers (") for name in found)  # one layer has 16,000 parameters
    only = SpaceArgs(fixed=["head_size", "n_embd", "n_layer", "n_query_groups", "heads_per_group", "intermediate_size"])
    assert [start.subnet for start in simple_starts(Space(GQA, "fine_uniform", args=only))] in ([], [SubNet.full(GQA)])


@pytest.mark.parametrize("amount", ["flops", "kv_cache_bytes", "weight_bytes"])
def test_starts_keep_to_limits(amount):
    args = MeasureArgs(16)
    most = 0.7 * MEASURES[amount](GQA, SubNet.full(GQA), args)
    ranges: dict[str, Range] = {amount: (0.4 * most, most)}
    space = Space(GQA, "fine_uniform", limits=Limits(ranges, GQA, args))
    starts = simple_starts(space)
    costs = [MEASURES[amount](GQA, start.subnet, args) for start in starts]
    assert len(starts) > 3 and all(0.4 * most <= cost <= most for cost in costs)
    if amount == "flops":  # every single neuron adds FLOPs
        neurons = len(by_origin(space)["neurons"].layer(0).intermediate_size)
        assert MEASURES[amount](GQA, SubNet(GQA, intermediate_size=neurons + 1), args) > most


def test_units_and_layers_are_the_most_important_ones():
    order = random_ranking(GQA).order
    full = n_params(GQA, SubNet.full(GQA))
    for name in ("fine_uniform", "fine_layerwise"):
        found = by_origin(Space(GQA, name, Bin(full * 6 // 10, full * 7 // 10)), order)
        width = len(found["neurons"].layer(0).intermediate_size)
        for i in range(6):
            best = sorted(order.layers[i]["intermediate_size"][:width])
            assert found["neurons"].layer(i).intermediate_size.indices.tolist() == best
        channels = found["channels"].n_embd
        assert channels.indices.tolist() == sorted(order.n_embd[: len(channels)])
        layers = found["layers (importance)"].layers
        assert layers == tuple(sorted(order.n_layer[: len(layers)]))
    assert by_origin(Space(GQA, "coarse_uniform", Bin(full // 2, full * 7 // 10)), order)["neurons"].is_uniform
    best = Space(GQA, "coarse_layerwise", Bin(full * 6 // 10, full * 7 // 10), order=order)
    assert by_origin(best, order)["neurons"] == found["neurons"]


def test_children_of_starts_in_a_uniform_space_keep_each_layers_own_units():
    order, rng = random_ranking(GQA).order, np.random.default_rng(0)
    full = n_params(GQA, SubNet.full(GQA))
    space = Space(GQA, "fine_uniform", Bin(full * 6 // 10, full * 7 // 10))
    found = by_origin(space, order)
    mother, father = found["neurons"], found["heads and neurons"]
    for _ in range(10):
        child = space.crossover(rng, mother, father)
        assert_member(child, space, SpaceArgs())
        for i in range(6):
            theirs = [set(parent.layer(i).intermediate_size.indices) for parent in (mother, father)]
            ours = set(child.layer(i).intermediate_size.indices)
            assert any(ours >= own or ours <= own for own in theirs)
    assert space.near(rng, space.sizes_of(mother), mother) == mother
    for child in (
        space.crossover(rng, mother, space.sample(rng)),
        space.crossover(rng, space.sample(rng), found["layers (middle)"]),
        space.mutate(rng, mother, 0.5),
        space.trade(rng, mother),
    ):
        assert_member(child, space, SpaceArgs())


# -- in a search


SPACE = Space(TEACHER, "fine_uniform", Bin(16_000, 19_000))


def make(name: str):
    cls = registry.lookup(GROUP, name)
    known = inspect.signature(cls).parameters
    return cls(**{key: value for key, value in SMALL.items() if key in known})


class Plain(Windows):
    """A made-up fitness by which cutting neurons alone is better than any mixture."""

    def _means(self, subnet) -> np.ndarray:
        n_cut = (len(subnet) < 4) + (len(subnet.n_embd) < 24) + (len(subnet.layer(0).n_query_groups) < 4)
        return super()._means(subnet) + 10 * n_cut


def searched(strategy, fitness, iterations, record=None, starts=None, racing=None, folder=None) -> tuple[list, Search]:
    search, record = Search.begin(SPACE, strategy, "nll", 3), record or Listed()
    search.starts = simple_starts(SPACE, random_ranking(TEACHER).order) if starts is None else starts
    args = ([search], record, fitness, iterations, 3, lambda *_: None)
    if racing:
        RacingLoop(*args, racing=racing, notes=RaceNotes(folder / "race.jsonl", [])).run()
    else:
        Loop(*args).run()
    return record.evaluations, search


@pytest.mark.parametrize("fitness", [Plain, Windows], ids=["plain", "windows"])
@pytest.mark.parametrize("name", registry.names(GROUP))
def test_no_search_ends_worse_than_the_best_of_its_starts(name, fitness):
    starts = simple_starts(SPACE, random_ranking(TEACHER).order)
    evaluations, search = searched(make(name), fitness(2), len(starts) + 12)
    assert [(e.origin, e.subnet) for e in evaluations[: len(starts)]] == [(o, s.to_dict()) for o, s in starts]
    assert all(e.origin is None for e in evaluations[len(starts) :]) and len(evaluations) == len(starts) + 12
    best = min(fitness(2)(start.subnet)["nll"] for start in starts)
    assert search.best.score("nll") <= best and search.strategy.best.score <= best
    subnets = [json.dumps(e.subnet) for e in evaluations]
    assert len(set(subnets)) == len(subnets)  # no start is proposed again


def test_a_plain_idea_that_is_best_is_found_at_once():
    _evaluations, search = searched(Evolution(), Plain(2), 40)
    assert search.best.origin == "neurons" and search.best.index == 0
    alone, _ = searched(Evolution(), Plain(2), 40, starts=[])
    assert search.best.score("nll") < min(e.score("nll") for e in alone)


def test_starts_are_among_what_a_strategy_goes_on_from():
    starts = simple_starts(SPACE, random_ranking(TEACHER).order)
    best = min(starts, key=lambda start: Plain(2)(start.subnet)["nll"]).subnet
    _, search = searched(make("EvoPress"), Plain(2), SMALL["n_initial"] + 1)
    assert search.strategy.parent.subnet == best
    _, search = searched(make("Evolution"), Plain(2), SMALL["population_size"] + 1)
    assert best in [parent.subnet for parent in search.strategy.parents]


def test_fewer_evaluations_than_starts_are_enough():
    evaluations, search = searched(Evolution(), Plain(2), 2)
    assert [e.origin for e in evaluations] == ["neurons", "layers (importance)"] and search.best is not None


@pytest.mark.parametrize("n", [2, 9, 20])
def test_a_replayed_record_goes_on_in_the_same_way(n):
    whole, _ = searched(make("Evolution"), Windows(2), 30)
    record = Listed()
    searched(make("Evolution"), Windows(2), n, record)
    again, _ = searched(make("Evolution"), Windows(2), 30, record)
    plain = lambda evaluations: [(e.subnet, e.scores, e.origin) for e in evaluations]
    assert plain(again) == plain(whole)


def test_starts_race(tmp_path):
    evaluations, search = searched(Evolution(20, 3, 20), fitness := Plain(16), 40, racing=RacingArgs(), folder=tmp_path)
    full = Plain(16)
    _, expected = searched(Evolution(20, 3, 20), full, 40)
    assert search.best.score("nll") <= expected.best.score("nll") + 0.02 and fitness.seen < full.seen
    assert any(e.dropped for e in evaluations if e.origin)


# -- the command


def starts_of(out_dir) -> list:
    return [e for e in read_journal(out_dir / "journal.jsonl")[1] if e.origin is not None]


def test_every_bin_has_its_starts(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", bin=["8K-10K", "14K"], iterations=16)
    for bin in ("8K-10K", "13.3K-14.7K"):
        own = [e for e in starts_of(tmp_path / "out") if e.bin == bin]
        assert {"neurons", "channels"} & {e.origin for e in own}
        assert all(e.n_params in Bin.parse(bin) for e in own)


@pytest.mark.parametrize("space", SPACES)
def test_a_search_stopped_among_its_starts_resumes_to_the_same_end(checkpoint, tmp_path, space, monkeypatch):
    run(checkpoint, tmp_path / "whole", iterations=14, space=space)
    run(checkpoint, tmp_path / "out", iterations=2, space=space)
    monkeypatch.setattr("litgpt_whittle.searching.starting.quick_order", lambda *_: pytest.fail("measured again"))
    run(checkpoint, tmp_path / "out", iterations=14, space=space, resume=True)
    assert lines(tmp_path / "out") == lines(tmp_path / "whole") and len(starts_of(tmp_path / "out")) > 2


def test_a_search_stopped_before_its_starts_were_written_builds_them(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "whole", iterations=8)
    run(checkpoint, tmp_path / "out", iterations=2)
    (tmp_path / "out/starts.json").unlink()
    run(checkpoint, tmp_path / "out", iterations=8, resume=True)
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")


def test_without_simple_starts_a_search_is_what_it_was(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", simple_starts=False)
    header, evaluations = read_journal(tmp_path / "out/journal.jsonl")
    assert "simple_starts" not in header["settings"] and not starts_of(tmp_path / "out")
    assert not (tmp_path / "out/starts.json").exists()
    strategy = Evolution(population_size=6, elites=3, n_offspring=4)
    strategy.start(Space(TEACHER, "fine_layerwise", Bin(8_000, 10_000), args=SpaceArgs(convertible=True)), 1)
    assert [e.subnet for e in evaluations[:6]] == [subnet.to_dict() for subnet in strategy.ask(6)]


def test_a_journal_from_before_there_were_simple_starts_is_resumed_without(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", iterations=4, simple_starts=False)
    path = tmp_path / "out/journal.jsonl"
    first, *rest = path.read_text().splitlines()
    old = [{key: value for key, value in json.loads(line).items() if key != "origin"} for line in rest]
    path.write_text("\n".join([first, *map(json.dumps, old)]) + "\n")
    run(checkpoint, tmp_path / "out", iterations=9, resume=True)
    run(checkpoint, tmp_path / "whole", iterations=9, simple_starts=False)
    assert [e["subnet"] for e in lines(tmp_path / "out")[1:]] == [e["subnet"] for e in lines(tmp_path / "whole")[1:]]


def test_simple_starts_cannot_be_left_out_later(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", iterations=1)
    with pytest.raises(UserError, match=r"settings\.simple_starts was True"):
        run(checkpoint, tmp_path / "out", resume=True, simple_starts=False)


def test_units_come_from_a_ranking_where_there_is_one(checkpoint, tmp_path, monkeypatch):
    ranking = random_ranking(TEACHER, weights=weights_fingerprint(checkpoint))
    ranking.save(tmp_path / "importance.pt")
    monkeypatch.setattr("litgpt_whittle.searching.starting.quick_order", lambda *_: pytest.fail("measured"))
    run(checkpoint, tmp_path / "out", importance=tmp_path / "importance.pt", space="fine_uniform", bin="14K")
    header, evaluations = read_journal(tmp_path / "out/journal.jsonl")
    assert header["settings"]["importance"] == ranking.fingerprint
    first = SubNet.from_dict(TEACHER, evaluations[0].subnet)
    assert evaluations[0].origin == "neurons"
    for i, own in enumerate(Ranking.load(tmp_path / "importance.pt", TEACHER).order.layers):
        units = first.layer(i).intermediate_size
        assert units.indices.tolist() == sorted(own["intermediate_size"][: len(units)])


@pytest.mark.parametrize(("n_rows", "n_apart"), [(12, 8), (4, 0)])
def test_units_are_measured_on_text_that_does_not_score_if_there_is_any(
    checkpoint, tmp_path, monkeypatch, n_rows, n_apart
):
    measured = []
    monkeypatch.setattr(
        "litgpt_whittle.searching.starting.quick_order",
        lambda model, text, autocast: measured.extend(torch.cat(text).tolist()) or random_ranking(TEACHER).order,
    )
    run(checkpoint, tmp_path / "out", data=Tokens(n_rows), iterations=1)
    data = Tokens(n_rows)
    data.connect(batch_size=2, max_seq_length=12)
    rows = torch.cat(data.val_dataloader())[:, :12].tolist()  # of which 2 batches of 2 are scored
    assert measured == (rows[4:] if n_apart else rows)


def test_a_fitness_that_chooses_units_gets_their_numbers_alone(checkpoint, tmp_path):
    class Text(Tokens):
        def train_dataloader(self):
            rows = torch.randint(0, 61, (40, self.length), generator=torch.Generator().manual_seed(9))
            return list(rows.split(self.batch_size))

    changes = {"fitness": "repaired_perplexity", "data": Text(), "iterations": 5, "eval": BudgetArgs(1)}
    run(checkpoint, tmp_path / "out", space="fine_uniform", bin="16K-19K", **changes)
    found = starts_of(tmp_path / "out")
    assert {"neurons", "layers (importance)"} <= {e.origin for e in found}
    for e in found:
        subnet = SubNet.from_dict(TEACHER, e.subnet)
        assert all(subnet.layer(i).intermediate_size.is_prefix for i in range(len(subnet)))


def test_a_fitness_without_text_has_starts_too(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", fitness="weight_magnitude", data=None, space="fine_uniform", bin="16K-19K")
    assert {"neurons", "layers (middle)"} <= {e.origin for e in starts_of(tmp_path / "out")}


def test_a_search_for_a_front_starts_at_several_sizes(checkpoint, tmp_path):
    pytest.importorskip("pymoo")
    run(checkpoint, tmp_path / "out", bin="6K-20K", strategy=NSGA2(population_size=8), iterations=20)
    counts = [e.n_params for e in starts_of(tmp_path / "out") if e.origin == "neurons"]
    assert len(counts) > 1 and max(counts) > 1.1 * min(counts)


def test_the_report_names_the_starts(tmp_path_factory, tmp_path, monkeypatch):
    from litgpt_whittle.reports.report import write_report

    run(make_checkpoint(tmp_path_factory.mktemp("teacher") / "t"), tmp_path / "out", strategy=RandomSearch())
    write_report(tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "Simple starts" in page and "heads and neurons" in page


def test_what_orders_starts_is_an_order_of_all_units():
    """Ties keep the first units, as everywhere."""
    order = Order.by(TEACHER, np.zeros(24), np.zeros(4), tuple(
        {name: np.zeros(n) for name, n in layer_sizes(TEACHER, i).items()} for i in range(4)
    ))  # fmt: skip
    starts = simple_starts(SPACE, order)
    assert all(isinstance(start, Start) and start.subnet.n_embd.is_prefix for start in starts)
