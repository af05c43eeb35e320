"""Checks of search strategies.

Each check takes a function without arguments that returns a new strategy, such as its class.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial

import numpy as np
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.metrics import MEASURES, MeasureArgs
from litgpt_whittle.spaces.args import SpaceArgs
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.limits import Limits
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies import RandomSearch, Scored, Strategy
from litgpt_whittle.strategies.choices import Choices
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.testing.inputs import LEAN

Make = Callable[[], Strategy]
"""Returns a new strategy: its class, or a `functools.partial` with settings"""

TEACHER = Config.from_name("pythia-14m", n_layer=4, n_embd=32, n_head=4, intermediate_size=64, block_size=32)
SPACE = Space(TEACHER, "coarse_layerwise", Bin(3_000_000, 3_150_000))
LEAN_SPACE = Space(LEAN, "coarse_layerwise", Bin.parse("30K±10%"))
_ARGS = MeasureArgs(seq_length=32)


def check_strategy(make: Make) -> None:
    """Run all checks of `CHECKS` on a search strategy.

    Args:
        make: Returns a new strategy: its class, or a `functools.partial` with small settings. The checks score up to
            100 candidates, which should be several generations.

    Raises:
        AssertionError: If the strategy breaks a rule, which the message names.
    """
    for check in CHECKS:
        check(make)


# -- running a strategy


def begin(make: Make, space: Space = SPACE, seed: int = 1) -> Strategy:
    """Return a new strategy that has started a search, with scores of its `measurements` if it needs them."""
    strategy = make()
    start(strategy, space, seed)
    return strategy


def start(strategy: Strategy, space: Space = SPACE, seed: int = 1) -> None:
    """Start a search, with scores of the strategy's `measurements` if it needs them."""
    strategy.start(space, seed)
    if strategy.needs_measurements:
        with suppress(UserError):  # a strategy that cannot search this space runs without measurements
            subnets = strategy.measurements().items()
            strategy.take_measurements({name: Scored(each, loss(each), measures(each)) for name, each in subnets})


def loss(subnet: SubNet) -> float:
    """Return a made-up loss, which is lower for more and wider layers, early layers most."""
    return 10 - sum(subnet.layer(i).sizes[2] / (64 * (i + 1)) for i in range(len(subnet)))


def measures(subnet: SubNet) -> dict[str, float]:
    """Return measures for all possible objectives; latencies are made up from the number of layers."""
    teacher = subnet.teacher
    costs = {name: len(subnet) if m.is_timed else m(teacher, subnet, _ARGS) for name, m in MEASURES.items()}
    return {name: float(cost) for name, cost in costs.items()}


def run(strategy: Strategy, n: int, score: Callable[[SubNet], float] = loss, ask: int = 1) -> list[Scored]:
    """Ask for n candidates, `ask` at a time, and report their scores and measures to the strategy."""
    evaluated: list[Scored] = []
    while len(evaluated) < n and (candidates := strategy.ask(min(ask, n - len(evaluated)))):
        for candidate in candidates:
            evaluated.append(Scored(candidate, score(candidate), measures(candidate)))
            strategy.tell(*evaluated[-1])
    return evaluated


def others(n: int) -> list[SubNet]:
    """Return up to n random sub-networks, which stand for candidates that no strategy proposed."""
    rng = np.random.default_rng(99)
    return list(dict.fromkeys(SPACE.sample(rng) for _ in range(n)))


# -- rules


def check_candidates(make: Make) -> None:
    """Check that candidates lie in the bin, and none is proposed twice."""
    candidates = [scored.subnet for scored in run(begin(make), 60)]
    assert len(candidates) == 60, f"a strategy must keep proposing in a large space, it stopped at {len(candidates)}"
    n_repeated = 60 - len(set(candidates))
    assert not n_repeated, f"a strategy must not propose a candidate twice, {n_repeated} of 60 were"
    outside = [n for n in map(SPACE.n_params, candidates) if n not in SPACE.bin]
    assert not outside, f"candidates must lie in the bin {SPACE.bin}, one has {outside[0]:,} parameters"


def check_seed(make: Make) -> None:
    """Check that proposals depend only on the seed and the reported scores."""
    same = run(begin(make), 40) == run(begin(make), 40)
    assert same, "proposals must depend only on the seed and the scores, two searches with the same ones differ"


def check_other_seed(make: Make) -> None:
    """Check that another seed gives other candidates. Leave this check out for a strategy without randomness."""
    differs = run(begin(make), 10) != run(begin(make, seed=2), 10)
    assert differs, "another seed must give other candidates"


def check_batches(make: Make) -> None:
    """Check that the candidates do not depend on how many are asked for at a time."""
    expected = run(begin(make), 40)
    for n in (3, 100):
        same = run(begin(make), 40, ask=n) == expected
        assert same, f"candidates must not depend on how many are asked for at a time, but 1 and {n} differ"


def check_restart(make: Make) -> None:
    """Check that `start` discards the earlier search."""
    strategy = begin(make)
    first = run(strategy, 20)
    start(strategy)
    assert run(strategy, 20) == first, "start must discard all earlier state, the second search differs from the first"


def check_replay(make: Make) -> None:
    """Check that reporting the scores of a journal brings the strategy back, as `--resume` needs."""
    for n in (1, 8, 13, 31):
        unbroken, replayed = begin(make), begin(make)
        for subnet, score, known in run(unbroken, n):
            assert replayed.ask(1) == [subnet], f"a replay of {n} scores must propose what the journal has"
            replayed.tell(SubNet.from_dict(TEACHER, subnet.to_dict()), score, known)
        assert replayed.best == unbroken.best, f"a replay of {n} scores must have the same best candidate"
        assert run(replayed, 20) == run(unbroken, 20), f"a search must be the same after a replay of {n} scores"


def check_best(make: Make) -> None:
    """Check that `best` is the candidate with the lowest score."""
    strategy = begin(make)
    assert strategy.best is None, "best must be None before the first score"
    evaluated = run(strategy, 50)
    assert strategy.best == min(evaluated, key=lambda scored: scored.score), (
        "best must be the earliest of the lowest scores"
    )


def check_failures(make: Make) -> None:
    """Check that a search continues after failed candidates, whose scores are NaN or infinite."""
    strategy = begin(make)
    failed = run(strategy, 20, score=lambda _: math.nan)
    assert len(failed) == 20, f"a strategy must continue after failed candidates, it stopped at {len(failed)}"
    assert strategy.best is None, "best must be None while all candidates have failed"
    scores = iter([math.inf, -math.inf, math.nan, 5.0, 4.0] * 10)
    run(strategy, 50, score=lambda _: next(scores))
    best = None if strategy.best is None else strategy.best.score
    assert best == 4.0, f"best must be the lowest finite score, 4.0, it is {best}"


def check_others_first(make: Make) -> None:
    """Check that candidates reported without being proposed, such as simple starts, count and are not proposed."""

    def begun() -> Strategy:
        strategy = begin(make)
        for candidate in given:
            strategy.tell(candidate, loss(candidate), measures(candidate))
        return strategy

    for given in map(others, (1, 7, 30)):
        strategy = begun()
        best = None if strategy.best is None else strategy.best.subnet
        assert best == min(given, key=loss), "best must include reported candidates that were not proposed"
        evaluated = run(strategy, 40)
        candidates = [scored.subnet for scored in evaluated]
        assert len(candidates) == 40, f"a strategy must continue after {len(given)} candidates that it did not propose"
        is_new = len({*candidates, *given}) == 40 + len(given)
        assert is_new, "a strategy must not propose what was reported without having been proposed"
        assert run(begun(), 40, ask=100) == evaluated, "candidates must not depend on how many are asked for at a time"
        assert strategy.best is not None and strategy.best.score == min(map(loss, [*candidates, *given])), (
            "best must be the lowest score of all reported candidates"
        )


def check_others_any_time(make: Make) -> None:
    """Check that candidates that were not proposed may be reported at any time."""
    strategy, more = begin(make), iter(others(40))
    for _ in range(15):
        asked = strategy.ask(3)
        assert asked, "a strategy must continue when candidates that it did not propose are reported in between"
        for candidate in (next(more), *asked, next(more)):
            strategy.tell(candidate, loss(candidate), measures(candidate))


def check_exhaustion(make: Make) -> None:
    """Check that the search ends when all sub-networks of a small space have been proposed."""
    args = SpaceArgs(fixed=["head_size", "n_embd", "n_query_groups", "intermediate_size"])
    full = SPACE.n_params(SubNet.full(TEACHER))
    space = Space(TEACHER, "coarse_uniform", Bin(full // 2, full), args=args)
    strategy = begin(make, space)
    n = len(run(strategy, 100))
    assert n == 2**4 - 1, f"a strategy must propose all 15 sub-networks of a small space, it proposed {n}"  # layers
    ended = strategy.exhausted and strategy.ask(1) == []
    assert ended, "a strategy must be exhausted when all sub-networks of the space have been proposed"


def check_limits(make: Make) -> None:
    """Check that all candidates are within the limits of the space."""
    full = {name: MEASURES[name](LEAN, SubNet.full(LEAN), _ARGS) for name in ("flops", "kv_cache_bytes")}
    ranges = {
        "flops": (0.3 * full["flops"], 0.7 * full["flops"]),
        "kv_cache_bytes": (0.0, 0.6 * full["kv_cache_bytes"]),
    }
    space = Space(LEAN, "coarse_layerwise", None, limits=Limits(ranges, LEAN, _ARGS))
    evaluated = run(begin(make, space), 30, lambda subnet: float(space.n_params(subnet)), ask=5)
    assert len({scored.subnet for scored in evaluated}) == 30, "candidates within limits must be new ones"
    for name, (lo, hi) in ranges.items():
        costs = [MEASURES[name](LEAN, scored.subnet, _ARGS) for scored in evaluated]
        within = all(lo <= cost <= hi for cost in costs)
        assert within, f"candidates must keep to the limit of {name}, {lo:g} to {hi:g}; they have up to {max(costs):g}"


def check_settings(make: Make) -> None:
    """Check that all arguments of `__init__` are stored under their names, and recreate the strategy."""
    strategy = begin(make)
    missing = inspect.signature(type(strategy)).parameters.keys() - strategy.settings.keys()
    assert not missing, f"__init__ must store each argument under its own name, {sorted(missing)} are not stored"
    again = type(strategy)(**strategy.settings)
    start(again)
    assert run(again, 20) == run(strategy, 20), (
        "stored settings must be those given, a strategy made from them behaves differently"
    )


CHECKS: tuple[Callable[[Make], None], ...] = (
    check_candidates,
    check_seed,
    check_other_seed,
    check_batches,
    check_restart,
    check_replay,
    check_best,
    check_failures,
    check_others_first,
    check_others_any_time,
    check_exhaustion,
    check_limits,
    check_settings,
)
"""All rules of a strategy, which can be run one by one"""


# -- not a rule


def check_learns(make: Make) -> None:
    """Check that a strategy finds better candidates than random search; not part of `check_strategy`.

    The mean distance of its best candidates to several hidden targets must be at most 0.9 times that of random search.
    """
    ours, rivals = mean_distance(make), _random_distance()
    assert ours < 0.9 * rivals, (
        f"a strategy that learns must get closer than random search, at {rivals:.3g}; its distance is {ours:.3g}"
    )


def mean_distance(make: Make) -> float:
    """Return the mean distance of a strategy's best sub-networks to four hidden targets."""
    choices, best = Choices(LEAN_SPACE), []
    for seed in range(15, 19):
        goal = choices.of(LEAN_SPACE.sample(np.random.default_rng(seed)))

        def distance(goal: dict[str, int], subnet: SubNet) -> float:
            numbers = choices.of(subnet)
            return sum(abs(numbers[key] - goal[key]) / (hi - lo) for key, (lo, hi) in choices.bounds.items())

        strategy = begin(make, LEAN_SPACE, seed=100 + seed)
        run(strategy, 120, partial(distance, goal))
        best.append(math.inf if strategy.best is None else strategy.best.score)
    return float(np.mean(best))


@cache
def _random_distance() -> float:
    return mean_distance(RandomSearch)
