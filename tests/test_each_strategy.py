"""Test each strategy's behaviour beyond the common contract."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_strategies import SMALL, make, small

from litgpt_whittle.errors import UserError
from litgpt_whittle.spaces import space as space_module
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies import NSGA2, TPE, Evolution, EvoPress, LocalSearch, StratifiedRandom
from litgpt_whittle.testing.inputs import LEAN
from litgpt_whittle.testing.strategies import LEAN_SPACE, SPACE, TEACHER, check_learns, loss, measures, run


@pytest.mark.parametrize("name", ["Evolution", "EvoPress", "LocalSearch", "TPE"])
def test_what_learns_beats_random_search(name):
    check_learns(small(name))


@pytest.mark.parametrize(
    ("name", "first", "then"),
    [("Evolution", 8, 6), ("EvoPress", 8, 6), ("LocalSearch", 4, 1), ("NSGA2", 8, 8), ("TPE", 8, 1)],
)
def test_a_generation_waits_for_all_scores_of_the_last_one(name, first, then):
    strategy = make(name)
    for size in (first, then, then):
        generation = strategy.ask(100)
        assert len(generation) == size and strategy.ask(1) == [] and not strategy.exhausted
        for candidate in generation[:-1]:
            strategy.tell(candidate, loss(candidate), measures(candidate))
        assert strategy.ask(1) == []
        strategy.tell(generation[-1], loss(generation[-1]), measures(generation[-1]))


@pytest.mark.parametrize("name", ["Evolution", "EvoPress", "LocalSearch", "NSGA2", "TPE"])
def test_what_learns_goes_on_from_a_good_candidate_that_it_did_not_propose(name):
    strategy, good = make(name), SPACE.sample(np.random.default_rng(5))
    strategy.tell(good, -100.0, measures(good))
    run(strategy, 3 if name == "LocalSearch" else 7)  # until the end of the first generation
    others = {"EvoPress": "parent", "LocalSearch": "at"}
    if name in others:
        assert getattr(strategy, others[name]).subnet == good
    elif name == "TPE":
        assert strategy._best == good
    else:
        assert good in [parent.subnet for parent in strategy.parents]


def test_tpe_asks_for_the_same_however_many_at_a_time():
    asked = []
    for n in (1, 8):
        strategy, found = TPE(n_initial=8, batch_size=8), []
        strategy.start(LEAN_SPACE, 1)
        while len(found) < 40:
            for candidate in strategy.ask(n):
                found.append(candidate)
                strategy.tell(candidate, loss(candidate), measures(candidate))
        asked.append(found)
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Evolution, {"population_size": 0}, "population_size must be at least 1, got 0"),
        (Evolution, {"random_fraction": 1.5}, "random_fraction must be between 0 and 1, got 1.5"),
        (StratifiedRandom, {"n_strata": 0}, "n_strata must be at least 1"),
        (LocalSearch, {"patience": 0}, "patience must be at least 1"),
        (LocalSearch, {"mutation_probability": -0.1}, "mutation_probability must be between 0 and 1"),
        (EvoPress, {"max_trades": 0}, "max_trades must be at least 1"),
        (TPE, {"n_modelled": 0}, "n_modelled must be at least 1"),
        (TPE, {"exchange_probability": 2}, "exchange_probability must be between 0 and 1"),
        (NSGA2, {"population_size": 0}, "population_size must be at least 1"),
        (NSGA2, {"objectives": ()}, r"objectives must be one or more different names, got \[\]"),
        (NSGA2, {"objectives": ("score", "score")}, "objectives must be one or more different names"),
    ],
)
def test_wrong_settings_are_refused(cls, settings, message):
    with pytest.raises(UserError, match=f"strategy.{message}"):
        cls(**settings)


@pytest.mark.parametrize(("cls", "package", "extra"), [(NSGA2, "pymoo", "nsga2"), (TPE, "optuna", "tpe")])
def test_a_missing_package_is_named_with_its_remedy(cls, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail
    with pytest.raises(
        UserError, match=rf"{cls.__name__} needs {package} .*pip install 'litgpt-whittle\[{extra}\]'"
    ) as e:
        cls()
    assert "\n" not in str(e.value)


# -- Evolution


def test_evolution_keeps_the_best_as_parents():
    strategy = make("Evolution")
    first = run(strategy, SMALL["population_size"])
    assert strategy.parents == sorted(first, key=lambda scored: scored.score)[: SMALL["elites"]]


# -- StratifiedRandom


@pytest.mark.parametrize("name", ["coarse_layerwise", "fine_uniform"])
def test_stratified_random_is_even_over_the_bin(name):
    space = Space(LEAN, name, LEAN_SPACE.bin)
    counts = [space.n_params(scored.subnet) for scored in run(make("StratifiedRandom", space), 40)]
    edges = np.linspace(space.bin.lo, space.bin.hi + 1, SMALL["n_strata"] + 1)
    assert np.histogram(counts, edges)[0].tolist() == [10] * SMALL["n_strata"]
    # each round visits all strata
    assert np.digitize(counts, edges).tolist() == [1, 2, 3, 4] * 10


def test_stratified_random_passes_over_empty_strata():
    """The embedding's 100,608 parameters per channel leave gaps."""
    gap = Space(TEACHER, "coarse_uniform", Bin(3_020_000, 3_122_000))
    strategy = StratifiedRandom(n_strata=12)
    strategy.start(gap, seed=1)
    parts = [part.bin for part in strategy.strata]
    assert 1 < len(parts) < 12
    found = Counter(
        sum(gap.n_params(scored.subnet) > part.hi for part in parts) for scored in run(strategy, 5 * len(parts))
    )
    assert found == dict.fromkeys(range(len(parts)), 5)


def test_stratified_random_works_where_no_stratum_seems_reachable(monkeypatch):
    whole, strategy = SPACE.bin, StratifiedRandom(n_strata=3)
    draw = space_module.draw
    monkeypatch.setattr(
        space_module,
        "draw",
        lambda sizes, rng, bin, *wish: draw(sizes, rng, bin, *wish) if bin == whole else None,
    )
    strategy.start(SPACE, seed=1)
    assert strategy.strata == [SPACE] and len(run(strategy, 10)) == 10


# -- LocalSearch


def test_local_search_climbs_and_starts_anew_when_its_patience_is_over():
    strategy = LocalSearch(n_starts=3, n_neighbours=2, patience=4)
    strategy.start(SPACE, seed=1)
    generations = [[5.0, 4.0, 6.0], [3.0, 7.0], [3.0, 3.5], [9.0, 9.0], [8.0, 7.0, 9.0], [6.0, 6.5]]
    where = [1, 3, 5, None, 10, 12]  # index of the current climb's candidate after each generation
    asked = []
    for scores, at in zip(generations, where):
        candidates = strategy.ask(100)
        assert len(candidates) == len(scores)
        asked += candidates
        for candidate, score in zip(candidates, scores):
            strategy.tell(candidate, score)
        assert (strategy.at and strategy.at.subnet) == (None if at is None else asked[at])
    assert strategy.best.subnet == asked[3]  # of the first climb, the earlier of equals


def test_local_search_only_proposes_neighbours(monkeypatch):
    strategy, parents = make("LocalSearch"), []
    mutate = Space.mutate
    monkeypatch.setattr(
        Space, "mutate", lambda self, rng, parent, p: parents.append(parent) or mutate(self, rng, parent, p)
    )
    first = run(strategy, SMALL["n_starts"])
    run(strategy, 3)
    assert parents[0] == min(first, key=lambda scored: scored.score).subnet


# -- EvoPress


def test_evopress_trades_and_keeps_the_better_of_parent_and_offspring(monkeypatch):
    monkeypatch.setattr(Space, "mutate", lambda *_: pytest.fail("EvoPress only trades"))
    strategy = EvoPress(n_initial=5, n_children=4, max_trades=2)
    strategy.start(LEAN_SPACE, seed=3)
    told = run(strategy, 5)
    for _ in range(6):
        assert strategy.parent.score == min(scored.score for scored in told)
        count = LEAN_SPACE.n_params(strategy.parent.subnet)
        told += run(strategy, 4)
        # each trade stays within a tenth of the bin
        assert all(abs(LEAN_SPACE.n_params(scored.subnet) - count) <= 2 * 6_000 / 10 for scored in told[-4:])


def test_evopress_starts_anew_where_nothing_could_be_scored():
    strategy = make("EvoPress")
    run(strategy, SMALL["n_initial"], score=lambda _: math.nan)
    assert strategy.parent is None and len(run(strategy, 10)) == 10 and strategy.parent is not None


# -- NSGA2


def beaten(one: tuple[float, ...], others: list[tuple[float, ...]]) -> bool:
    return any(other != one and all(a <= b for a, b in zip(other, one)) for other in others)


@pytest.mark.parametrize("objectives", [("score", "n_params"), ("score", "n_params", "kv_cache_bytes"), ("score",)])
def test_nsga2_keeps_the_front_first(objectives):
    strategy = NSGA2(objectives, population_size=15)
    strategy.start(SPACE, seed=1)

    def values(scored):
        return tuple({"score": scored.score, **scored.measures}[name] for name in objectives)

    parents = []
    for _ in range(4):
        pool = parents + run(strategy, 15)
        points = list(map(values, pool))
        front = [scored for scored in pool if not beaten(values(scored), points)]
        parents = strategy.parents
        assert len(parents) == 15 and all(scored in pool for scored in parents)
        assert all(scored in front for scored in parents[: len(front)])
        assert len(front) > 15 or all(scored in parents for scored in front)


CANDIDATES = [scored.subnet for scored in run(make("RandomSearch"), 20)]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20))
def test_nsga2_ranks_by_fronts(points):
    strategy = NSGA2(population_size=len(points))
    strategy.start(SPACE, seed=1)
    for (score, size), candidate in zip(points, CANDIDATES):
        strategy.tell(candidate, float(score), {"n_params": float(size)})
    ranked = [(scored.score, scored.measures["n_params"]) for scored in strategy.parents]
    expected, rest = [], [(float(score), float(size)) for score, size in points]
    while rest:
        front = [point for point in rest if not beaten(point, rest)]
        expected.append(sorted(front))
        rest = [point for point in rest if beaten(point, rest)]
    sizes = np.cumsum([0, *map(len, expected)])
    assert [sorted(ranked[a:b]) for a, b in zip(sizes, sizes[1:])] == expected


def test_nsga2_finds_a_better_front_than_random_search():
    """Measured by the area that a front of (score, parameters) dominates."""

    def area(told):
        points = sorted({(s.measures["n_params"] / 1e6, s.score) for s in told})
        total, lowest = 0.0, 10.0
        for n, score in points:
            if score < lowest:
                total, lowest = total + (lowest - score) * (3.15 - n), score
        return total

    rival, ours = run(make("RandomSearch"), 160), run(make("NSGA2"), 160)
    assert area(ours) > area(rival)


def test_nsga2_names_an_objective_that_was_not_measured():
    strategy = NSGA2(("score", "flops"), population_size=1)
    strategy.start(SPACE, seed=1)
    with pytest.raises(UserError, match="names 'flops', which was not measured"):
        strategy.tell(strategy.ask(1)[0], 1.0, {"n_params": 5.0})


def test_nsga2_passes_over_failed_measures():
    strategy = NSGA2(population_size=3)
    strategy.start(SPACE, seed=1)
    for size, candidate in zip((math.nan, 5.0, math.inf), strategy.ask(3)):
        strategy.tell(candidate, 1.0, {"n_params": size})
    assert [scored.measures["n_params"] for scored in strategy.parents] == [5.0]


# -- TPE


def test_tpe_changes_few_choices_of_the_best_one(monkeypatch):
    built = []
    strategy = TPE(n_initial=8, n_modelled=2)
    strategy.start(SPACE, seed=1)
    build = strategy.choices.build
    strategy.choices.build = lambda rng, numbers, *rest: (
        built.append((numbers, strategy.best.subnet)) or build(rng, numbers, *rest)
    )
    run(strategy, 30)
    assert len(built) >= 22
    for numbers, best in built:
        of_best = strategy.choices.of(best)
        assert sum(numbers[name] != of_best[name] for name in of_best) <= 2


def test_tpe_learns_which_sizes_are_good():
    """One of two MLPs should be wide, the other narrow; the model's samples must reflect this."""
    strategy = TPE(n_initial=60, n_modelled=20)
    strategy.start(Space(LEAN, "coarse_layerwise", Bin.parse("20K-50K")), seed=1)

    def score(subnet):
        numbers = strategy.choices.of(subnet)
        return numbers["intermediate_size.1"] - numbers["intermediate_size.2"] + 0.0

    run(strategy, 60, score)
    draws = [strategy._promising(np.random.default_rng(seed)) for seed in range(30)]
    one, two = (np.mean([draw[f"intermediate_size.{layer}"] for draw in draws]) for layer in (1, 2))
    assert one < 32 < 48 < two


def test_tpe_leaves_optunas_loudness_as_it_was():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        make("TPE")
        assert optuna.logging.get_verbosity() == optuna.logging.ERROR
    finally:
        optuna.logging.set_verbosity(optuna.logging.INFO)
