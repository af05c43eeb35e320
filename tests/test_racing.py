"""Test racing of candidates: eliminations, estimates, and the search's use of both."""

from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_search import TEACHER

from litgpt_whittle.batches import Batch
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness import Fitness, WindowFitness, WindowLosses
from litgpt_whittle.searching.args import RacingArgs
from litgpt_whittle.searching.loop import Loop, Search
from litgpt_whittle.searching.racing import estimate, losers, stages
from litgpt_whittle.searching.racing_loop import RaceNotes, RacingLoop, check_can_race
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies import NSGA2, Evolution, EvoPress, RandomSearch


@given(st.integers(1, 40), st.integers(1, 60), st.floats(1.01, 5))
def test_stages_grow_and_end_with_everything(start, n_batches, growth):
    ends = stages(RacingArgs(start=start, growth=growth), n_batches)
    assert ends[0] == min(start, n_batches) and ends[-1] == n_batches
    assert all(a < b for a, b in zip(ends, ends[1:]))
    assert all(b <= max(growth * a + 0.5, a + 1) for a, b in zip(ends, ends[1:]))


@given(st.integers(2, 12), st.integers(2, 9), st.integers(0, 4), st.integers(1, 8), st.integers(0, 10_000))
def test_losers_are_those_whom_a_paired_t_test_tells_from_the_last_kept(n, n_windows, n_done, n_kept, seed):
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=n_windows + 3)

    def candidate():
        return difficulty + rng.normal() + 0.3 * rng.normal(size=n_windows + 3)

    racing = {i: candidate()[:n_windows] for i in range(n)}
    finished = [candidate() for _ in range(n_done)]
    means = sorted([*(x.mean() for x in racing.values()), *(x[:n_windows].mean() for x in finished)])
    if len(means) <= n_kept:
        assert losers(racing, finished, n_kept, 0.05) == []
        return
    (rival,) = [x[:n_windows] for x in [*racing.values(), *finished] if x[:n_windows].mean() == means[n_kept - 1]]

    def is_worse(losses) -> bool:
        return losses is not rival and stats.ttest_rel(losses, rival, alternative="greater").pvalue < 0.05

    expected = [i for i, losses in racing.items() if is_worse(losses)]
    found = losers(racing, finished, n_kept, 0.05)
    assert found == expected
    # at least n_kept remain, including finished ones
    assert len(racing) - len(found) + n_done >= n_kept


def test_one_window_tells_nothing_and_equal_differences_everything():
    one, two = np.array([1.0]), np.array([2.0])
    assert losers({0: one, 1: two}, [], 1, 0.05) == []
    same = np.array([1.0, 3.0, 2.0])
    assert losers({0: same, 1: same + 0.1, 2: same}, [], 1, 0.05) == [1]


def test_an_estimate_is_exact_where_the_difference_is_the_same_everywhere():
    rng = np.random.default_rng(0)
    reference, n_tokens = rng.normal(3, 1, size=20), rng.integers(1, 50, size=20)
    true = np.average(reference + 0.7, weights=n_tokens)
    assert estimate((reference + 0.7)[:4], n_tokens, reference) == pytest.approx(true)


class Windows(WindowFitness):
    """A made-up fitness with differences between sub-networks, between windows, and small interactions."""

    name = "nll"

    def __init__(self, n_batches: int = 16, broken=(), noise: float = 0.05) -> None:
        ids = torch.zeros(4, 8, dtype=torch.long)
        self.batches = [Batch(ids, ids) for _ in range(n_batches)]
        self.n_tokens, self.seen, self.broken = 32 * n_batches, 0, broken
        self.noise = noise

    def _means(self, subnet) -> np.ndarray:
        sizes = [len(subnet.layer(i).intermediate_size) / (48 * (i + 1)) for i in range(len(subnet))]
        noise = np.random.default_rng(crc32(repr(subnet.to_dict()).encode())).normal(size=4 * len(self.batches))
        return 10 - sum(sizes) + np.random.default_rng(1).normal(size=len(noise)) + self.noise * noise

    def losses(self, subnet, which=slice(None)) -> WindowLosses:
        begin, end, _ = which.indices(len(self.batches))
        self.seen += 32 * (end - begin)
        sums = torch.from_numpy(self._means(subnet))[4 * begin : 4 * end] * 8
        return WindowLosses(sums, torch.full((len(sums),), 8))

    def scores(self, loss: float) -> dict[str, float]:
        return {"nll": loss}


class Listed:
    def __init__(self) -> None:
        self.evaluations = []

    def append(self, evaluation) -> None:
        self.evaluations.append(evaluation)


SPACE = Space(TEACHER, "coarse_layerwise", Bin(8_000, 10_000))


def searched(strategy, fitness, tmp_path, iterations=80, racing=None) -> tuple[Listed, Search]:
    search, record = Search.begin(SPACE, strategy, "nll", 3), Listed()
    args = ([search], record, fitness, iterations, 3, lambda *_: None)
    if racing is None:
        Loop(*args).run()
    else:
        RacingLoop(*args, racing=racing, notes=RaceNotes(tmp_path / "race.jsonl", [])).run()
    return record, search


@pytest.mark.parametrize("strategy", [Evolution(20, 5, 20), RandomSearch()], ids=["evolution", "random"])
def test_a_race_finds_the_best_for_a_part_of_the_tokens(tmp_path, strategy):
    racing, full = Windows(), Windows()
    record, search = searched(strategy, racing, tmp_path, racing=RacingArgs())
    _, expected = searched(strategy, full, tmp_path)
    assert search.best.score("nll") <= expected.best.score("nll") + 0.02
    assert racing.seen < full.seen / 2
    assert racing.seen == sum(e.tokens for e in record.evaluations)
    assert not (tmp_path / "race.jsonl").exists()


def test_what_counts_has_seen_everything(tmp_path):
    record, search = searched(Evolution(20, 5, 20), fitness := Windows(), tmp_path, racing=RacingArgs())
    dropped = [e for e in record.evaluations if e.dropped]
    finished = [e for e in record.evaluations if not e.dropped]
    assert dropped and finished and search.best in finished
    assert {e.batches for e in finished} == {16} and all(e.batches < 16 and e.losses is None for e in dropped)
    for e in finished:
        assert e.score("nll") == pytest.approx(np.mean(e.losses))
    # estimates are close to the scores on all of the data
    from litgpt_whittle.subnet import SubNet

    for e in dropped:
        assert e.score("nll") == pytest.approx(fitness(SubNet.from_dict(TEACHER, e.subnet))["nll"], abs=0.15)


@pytest.mark.parametrize("strategy", [Evolution(20, 5, 20), EvoPress()], ids=["evolution", "evopress"])
def test_no_estimate_is_as_good_as_what_a_candidate_was_dropped_for(tmp_path, strategy):
    record, search = searched(strategy, Windows(noise=0.5), tmp_path, 200, RacingArgs())
    best = min(told.score("nll") for told in record.evaluations if not told.dropped)
    dropped = [told.score("nll") for told in record.evaluations if told.dropped]
    assert len(dropped) > 20 and min(dropped) > best
    assert search.strategy.best.score == best


def test_candidates_that_fail_within_a_race_are_journalled(tmp_path):
    class Failing(Windows):
        def losses(self, subnet, which=slice(None)):
            found = super().losses(subnet, which)
            return found._replace(sums=found.sums * torch.nan) if len(subnet) % 3 == 1 else found

    record, search = searched(Evolution(20, 5, 20), Failing(), tmp_path, 40, RacingArgs())
    errors = {e.error for e in record.evaluations}
    assert errors == {None, "its loss is not finite"}
    assert all(e.batches == 0 for e in record.evaluations if e.error == "its loss is not finite")
    assert search.best is not None and len(record.evaluations) == 40


def test_notes_survive_a_torn_line(tmp_path):
    path = tmp_path / "race.jsonl"
    from litgpt_whittle.searching.racing_loop import Leg

    notes = RaceNotes(path, [])
    notes.add("8K-10K from 0", 3, 1, Leg([1.5, 2.5], 0.1))
    with open(path, "a") as file:
        file.write('{"race": 0, "cand')
    again = RaceNotes(path, RaceNotes.read(path))
    assert again.legs == {("8K-10K from 0", 3, 1): Leg([1.5, 2.5], 0.1)}
    again.add("8K-10K from 0", 4, 1, Leg([3.5], 0.1))
    assert RaceNotes(path, RaceNotes.read(path)).legs == again.legs  # including entries after the torn line


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"start": 0}, "racing.start must be at least 1"), ({"growth": 1.0}, "growth must be more than 1"),
     ({"alpha": 0.0}, "alpha must be between 0 and 1")],
)  # fmt: skip
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        RacingArgs(**settings)


def test_races_need_windows_and_one_score():
    class Plain(Fitness):
        name = "nll"

    search = Search.begin(SPACE, NSGA2(), "nll", 1)
    with pytest.raises(UserError, match="racing needs losses per window, which fitness 'plain' does not give"):
        check_can_race(Plain, "plain", search.strategy)
    with pytest.raises(UserError, match="NSGA2 needs exact scores"):
        check_can_race(Windows, "windows", search.strategy)
