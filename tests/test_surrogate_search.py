"""Test strategies with a surrogate: they keep the contract of a strategy, and need fewer evaluations."""

from functools import partial

import pytest
from test_strategies import GROUP, small
from test_strategies import make as make_plain

from litgpt_whittle import registry
from litgpt_whittle.errors import UserError
from litgpt_whittle.strategies.surrogate_search import Filter, OnPredictions, SurrogateSearch
from litgpt_whittle.surrogates import trees
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.surrogates.surrogate import Surrogate
from litgpt_whittle.surrogates.trees import Trees
from litgpt_whittle.testing import strategies as contract

TREES = partial(Trees, SurrogateArgs(mode="filter"))
SURROGATE = {
    "RandomSearch filtered": partial(Filter, n_initial=12, n_proposals=4),
    "Evolution filtered": partial(Filter, n_initial=12, n_proposals=4),
    "LocalSearch on predictions": partial(OnPredictions, n_initial=15, n_inner=20, n_evaluated=10),
    "Evolution on predictions": partial(OnPredictions, n_initial=12, n_inner=30, n_evaluated=5),
}


def unstarted(name: str) -> SurrogateSearch:
    return SURROGATE[name](small(name.split()[0])(), Surrogate(TREES, contract.TEACHER))


def make(name: str) -> SurrogateSearch:
    return contract.begin(partial(unstarted, name))


@pytest.fixture(autouse=True)
def _few_trees(monkeypatch):
    monkeypatch.setattr(trees, "N_TREES", 20)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "RandomSearch filtered" else pytest.mark.slow) for n in SURROGATE],
)
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_rules_of_strategies(name, check):
    check(partial(unstarted, name))


@pytest.mark.parametrize("name", ["RandomSearch filtered", "Evolution on predictions"])
def test_a_surrogate_finds_more_with_the_same_evaluations(name):
    plain, ours = make_plain(name.split()[0]), make(name)
    contract.run(plain, 60), contract.run(ours, 60)
    assert ours.best.score < plain.best.score


@pytest.mark.parametrize("name", SURROGATE)
def test_until_it_can_predict_a_surrogate_changes_nothing(name):
    plain, ours = make_plain(name.split()[0]), make(name)
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
    nsga2 = registry.lookup(GROUP, "NSGA2")
    with pytest.raises(UserError, match="only score and n_params, but the strategy minimises flops; use surr"):
        OnPredictions(nsga2(objectives=("score", "flops")), surrogate)
    for search in (partial(OnPredictions, n_inner=20), Filter):
        strategy = search(nsga2(population_size=8), surrogate, n_initial=12)
        strategy.start(contract.SPACE, 1)
        while len(strategy.history) < 25:
            [candidate] = strategy.ask(1)
            size = float(contract.SPACE.n_params(candidate))
            strategy.tell(candidate, contract.loss(candidate), {"n_params": size})
        assert strategy.objectives == ("score", "n_params")
