"""Test the contract of every registered search strategy."""

import inspect
import math

import numpy as np
import pytest
import torch
import yaml
from litgpt.config import Config
from litgpt.utils import CLI

from litgpt_whittle import registry
from litgpt_whittle.commands.search import setup
from litgpt_whittle.metrics import kv_cache_bytes
from litgpt_whittle.spaces.args import SpaceArgs
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies import Evolution, RandomSearch, Scored, Strategy
from litgpt_whittle.subnet import SubNet

GROUP = "litgpt_whittle.strategies"
TEACHER = Config.from_name("pythia-14m", n_layer=4, n_embd=32, n_head=4, intermediate_size=64, block_size=32)
SPACE = Space(TEACHER, "coarse_layerwise", Bin(3_000_000, 3_150_000))
SMALL = {
    "population_size": 8,
    "elites": 4,
    "n_offspring": 6,
    "n_children": 6,
    "n_initial": 8,
    "n_starts": 4,
    "patience": 5,
    "n_strata": 4,
}
EACH = pytest.mark.parametrize("name", registry.names(GROUP))


def make(name: str, space: Space = SPACE, seed: int = 1) -> Strategy:
    """Return a registered strategy, with small settings where possible."""
    cls = registry.lookup(GROUP, name)
    known = inspect.signature(cls).parameters
    strategy = cls(**{key: value for key, value in SMALL.items() if key in known})
    strategy.start(space, seed)
    return strategy


def loss(subnet: SubNet) -> float:
    """Return a loss to minimise: it prefers many wide layers early in the network."""
    return 10 - sum(len(subnet.layer(i).intermediate_size) / (64 * (i + 1)) for i in range(len(subnet)))


def measures(subnet: SubNet) -> dict[str, float]:
    """Return measures for all possible objectives."""
    size = kv_cache_bytes(TEACHER, subnet, batch_size=1, seq_length=32, dtype=torch.float32)
    return {"n_params": float(SPACE.n_params(subnet)), "kv_cache_bytes": float(size)}


def run(strategy: Strategy, n: int, score=loss, ask: int = 1) -> list[Scored]:
    """Ask for n candidates, a few at a time, and report their scores and measures."""
    told = []
    while len(told) < n and (candidates := strategy.ask(min(ask, n - len(told)))):
        for candidate in candidates:
            told.append(Scored(candidate, score(candidate), measures(candidate)))
            strategy.tell(*told[-1])
    return told


@EACH
def test_candidates_lie_in_the_bin_and_none_comes_twice(name):
    candidates = [scored.subnet for scored in run(make(name), 60)]
    assert len(candidates) == len(set(candidates)) == 60
    assert all(SPACE.n_params(candidate) in SPACE.bin for candidate in candidates)


@EACH
def test_the_seed_decides_and_nothing_else(name):
    assert run(make(name), 40) == run(make(name), 40)
    assert run(make(name), 10) != run(make(name, seed=2), 10)


@EACH
def test_asking_for_several_at_a_time_changes_nothing(name):
    assert run(make(name), 40) == run(make(name), 40, ask=3) == run(make(name), 40, ask=100)


@EACH
def test_starting_again_forgets(name):
    strategy = make(name)
    first = run(strategy, 20)
    strategy.start(SPACE, 1)
    assert run(strategy, 20) == first


@EACH
@pytest.mark.parametrize("n", [1, 8, 13, 31])
def test_a_replayed_journal_brings_the_strategy_back(name, n):
    unbroken, replayed = make(name), make(name)
    journal = run(unbroken, n)
    for subnet, score, known in journal:
        assert replayed.ask(1) == [subnet]
        replayed.tell(SubNet.from_dict(TEACHER, subnet.to_dict()), score, known)
    assert replayed.best == unbroken.best
    assert run(replayed, 20) == run(unbroken, 20)


@EACH
def test_the_best_is_kept(name):
    strategy = make(name)
    assert strategy.best is None
    told = run(strategy, 50)
    assert strategy.best == min(told, key=lambda scored: scored.score)


@EACH
def test_failed_scores_are_passed_over(name):
    strategy = make(name)
    failed = run(strategy, 20, score=lambda _: math.nan)
    assert len(failed) == 20 and strategy.best is None
    scores = iter([math.inf, -math.inf, math.nan, 5.0, 4.0] * 10)
    run(strategy, 50, score=lambda _: next(scores))
    assert strategy.best.score == 4.0


def foreign(n: int) -> list[SubNet]:
    """Return sub-networks that no strategy proposed."""
    rng = np.random.default_rng(99)
    return list(dict.fromkeys(SPACE.sample(rng) for _ in range(n)))


@EACH
@pytest.mark.parametrize("n", [1, 7, 30])
def test_scores_of_candidates_that_were_not_asked_for_are_taken(name, n):
    """Such as a search's simple starts: they count, are not proposed again, and the rest does not depend on batches."""

    def begun() -> Strategy:
        strategy = make(name)
        for candidate in foreign(n):
            strategy.tell(candidate, loss(candidate), measures(candidate))
        return strategy

    strategy = begun()
    assert strategy.best.subnet == min(foreign(n), key=loss)
    told = run(strategy, 40)
    candidates = [scored.subnet for scored in told]
    assert len(candidates) == 40 and len({*candidates, *foreign(n)}) == 40 + len(foreign(n))
    assert run(begun(), 40, ask=100) == told
    assert strategy.best.score == min(map(loss, [*candidates, *foreign(n)]))


@EACH
def test_candidates_that_were_not_asked_for_may_come_at_any_time(name):
    strategy, others = make(name), iter(foreign(40))
    for _ in range(15):
        asked = strategy.ask(3)
        assert asked  # in any generation
        for candidate in (next(others), *asked, next(others)):
            strategy.tell(candidate, loss(candidate), measures(candidate))


@EACH
def test_an_exhausted_space_ends_the_search(name):
    args = SpaceArgs(fixed=["head_size", "n_embd", "n_query_groups", "intermediate_size"])
    full = SPACE.n_params(SubNet.full(TEACHER))
    space = Space(TEACHER, "coarse_uniform", Bin(full // 2, full), args=args)
    strategy = make(name, space)
    told = run(strategy, 100)  # any non-empty set of layers
    assert len(told) == 2**4 - 1 and strategy.exhausted and strategy.ask(1) == []


@EACH
def test_settings_make_the_same_strategy_again(name):
    strategy = make(name)
    again = type(strategy)(**strategy.settings)
    again.start(SPACE, 1)
    assert run(again, 20) == run(strategy, 20)


@EACH
def test_a_strategys_own_defaults_hold_on_the_command_line(name, capsys):
    """jsonargparse passes the default strategy's settings on to another one if it has settings of the same names."""
    with pytest.raises(SystemExit):
        CLI(setup, args=["teacher", "--strategy", name, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)["strategy"].get("init_args", {})
    defaults = registry.lookup(GROUP, name)().settings
    assert shown == {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}


def test_ours_come_through_the_public_door():
    found = registry.load_all(GROUP)
    assert found["Evolution"] is Evolution and found["RandomSearch"] is RandomSearch
