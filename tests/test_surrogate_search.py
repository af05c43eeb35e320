"""Test strategies with a surrogate: they keep the contract of a strategy, and need fewer evaluations."""

from functools import partial

import pytest
import test_strategies as contract

from litgpt_whittle import registry
from litgpt_whittle.errors import UserError
from litgpt_whittle.strategies.surrogate_search import Filter, OnPredictions, SurrogateSearch
from litgpt_whittle.surrogates import trees
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.surrogates.surrogate import Surrogate
from litgpt_whittle.surrogates.trees import Trees

TREES = partial(Trees, SurrogateArgs(mode="filter"))
SURROGATE = {
    "RandomSearch filtered": partial(Filter, n_initial=12, n_proposals=4),
    "Evolution filtered": partial(Filter, n_initial=12, n_proposals=4),
    "LocalSearch on predictions": partial(OnPredictions, n_initial=15, n_inner=20, n_evaluated=10),
    "Evolution on predictions": partial(OnPredictions, n_initial=12, n_inner=30, n_evaluated=5),
}
EACH = pytest.mark.parametrize("name", SURROGATE)
CONTRACT = [
    contract.test_candidates_lie_in_the_bin_and_none_comes_twice,
    contract.test_the_seed_decides_and_nothing_else,
    contract.test_asking_for_several_at_a_time_changes_nothing,
    contract.test_starting_again_forgets,
    contract.test_the_best_is_kept,
    contract.test_failed_scores_are_passed_over,
    contract.test_an_exhausted_space_ends_the_search,
    contract.test_settings_make_the_same_strategy_again,
]
plain = contract.make


def make(name: str, space=contract.SPACE, seed: int = 1) -> SurrogateSearch:
    strategy = SURROGATE[name](plain(name.split()[0]), Surrogate(TREES, contract.TEACHER))
    strategy.start(space, seed)
    return strategy


@pytest.fixture(autouse=True)
def _few_trees(monkeypatch):
    monkeypatch.setattr(trees, "N_TREES", 20)


@pytest.fixture
def _with_surrogates(monkeypatch):
    monkeypatch.setattr(contract, "make", make)


@EACH
@pytest.mark.usefixtures("_with_surrogates")
@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__.removeprefix("test_"))
def test_it_keeps_the_contract(name, test):
    test(name)


@EACH
@pytest.mark.usefixtures("_with_surrogates")
@pytest.mark.parametrize("n", [1, 13, 31])
def test_a_replayed_journal_brings_it_back(name, n):
    contract.test_a_replayed_journal_brings_the_strategy_back(name, n)


@pytest.mark.parametrize("name", ["RandomSearch filtered", "Evolution on predictions"])
def test_a_surrogate_finds_more_with_the_same_evaluations(name):
    plain, ours = contract.make(name.split()[0]), make(name)
    contract.run(plain, 60), contract.run(ours, 60)
    assert ours.best.score < plain.best.score


@pytest.mark.parametrize("name", SURROGATE)
def test_until_it_can_predict_a_surrogate_changes_nothing(name):
    plain, ours = contract.make(name.split()[0]), make(name)
    first = contract.run(ours, ours.n_initial)
    assert first == contract.run(plain, ours.n_initial)
    assert ours.expects(first[0][0]) == {}
    [candidate] = ours.ask(1)
    assert ours.expects(candidate) == {"predicted": pytest.approx(ours.predictor.predict([candidate])[0])}


def test_a_filter_asks_for_the_best_of_several_proposals():
    strategy = make("RandomSearch filtered")
    contract.run(strategy, 12)
    proposed, propose = [], strategy.inner.propose
    strategy.inner.propose = lambda rng: proposed.append(propose(rng)) or proposed[-1]
    [candidate] = strategy.ask(1)
    assert len(proposed) == strategy.n_proposals and candidate in proposed
    for optimism in (0.0, 2.0):
        strategy.optimism, proposed[:] = optimism, []
        [candidate] = strategy.ask(1)
        hoped = strategy.predictor.predict(proposed, optimism)
        assert hoped[proposed.index(candidate)] == hoped.min() < hoped.max()
        assert strategy.expects(candidate)["predicted"] == strategy.predictor.predict([candidate])[0]


def test_searching_on_predictions_knows_the_score_and_the_size_only():
    surrogate = Surrogate(TREES, contract.TEACHER)
    nsga2 = registry.lookup(contract.GROUP, "NSGA2")
    with pytest.raises(UserError, match="score and n_params alone, the strategy minimises flops; use surrogate.mode"):
        OnPredictions(nsga2(objectives=("score", "flops")), surrogate)
    for search in (partial(OnPredictions, n_inner=20), Filter):
        strategy = search(nsga2(population_size=8), surrogate, n_initial=12)
        strategy.start(contract.SPACE, 1)
        while len(strategy.history) < 25:
            [candidate] = strategy.ask(1)
            size = float(contract.SPACE.n_params(candidate))
            strategy.tell(candidate, contract.loss(candidate), {"n_params": size})
        assert strategy.objectives == ("score", "n_params")
