"""Test surrogates: they learn rankings, also from another teacher's candidates, and reject uninformative data."""

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from litgpt.config import Config
from scipy.stats import kendalltau

from litgpt_whittle import registry
from litgpt_whittle.errors import UserError
from litgpt_whittle.evaluations import prediction_tau
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.journal import (
    Evaluation,
    Journal,
)
from litgpt_whittle.ranking.order import Order
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.surrogates.features import Features
from litgpt_whittle.surrogates.surrogate import LEAST, Examples, Scale, Surrogate, held_out_tau
from litgpt_whittle.surrogates.trees import Trees
from litgpt_whittle.testing.inputs import random_ranking
from litgpt_whittle.testing.surrogates import CHECKS

SMALL = dict(vocab_size=61, padded_vocab_size=64, block_size=16)
TEACHER = Config.from_name("pythia-14m", n_layer=6, n_embd=32, n_head=4, intermediate_size=64, **SMALL)
LARGER = Config.from_name("pythia-14m", n_layer=12, n_embd=48, n_head=8, intermediate_size=80, **SMALL)
TREES = partial(Trees, SurrogateArgs(mode="filter"))


def sample(teacher: Config, n: int, seed: int = 0, space: str = "coarse_layerwise", share: float = 0.5) -> list[SubNet]:
    size = int(share * n_params(teacher, SubNet.full(teacher)))
    drawn = Space(teacher, space, Bin(int(size * 0.9), int(size * 1.1)))
    return [drawn.sample(np.random.default_rng((seed, i))) for i in range(n)]


def loss(subnet: SubNet) -> float:
    """Return a sum over layers; early layers, heads and wide layers contribute more."""
    layers = [(layer / subnet.teacher.n_layer, subnet.layer(i)) for i, layer in enumerate(subnet.layers)]
    heads = sum((2 - at) * len(keep.n_query_groups) for at, keep in layers) / subnet.teacher.n_head
    neurons = sum((2 - at) * len(keep.intermediate_size) for at, keep in layers) / subnet.teacher.intermediate_size
    return math.exp(10 - (heads + neurons) / subnet.teacher.n_layer * 6)


def fitted(surrogate: Surrogate, known: list[SubNet], score=loss) -> Surrogate:
    surrogate.fit(known, [score(subnet) for subnet in known])
    return surrogate


def tau(surrogate: Surrogate, unknown: list[SubNet], score=loss) -> float:
    return kendalltau(surrogate.predict(unknown), [score(subnet) for subnet in unknown]).statistic


def write_search(folder: Path, chosen: list[SubNet], score=loss, bins: int = 1) -> Path:
    """Write a journal with these sub-networks, alternating bins, and a failed one at the end."""
    folder.mkdir(parents=True)
    teacher = chosen[0].teacher
    header = {"teacher": {"name": teacher.name, "architecture": asdict(teacher)}, "settings": {"score": "perplexity"}}
    with Journal(folder / "journal.jsonl", header) as journal:
        for i, subnet in enumerate(chosen):
            scores = {"perplexity": score(subnet) * 100 ** (i % bins)}
            journal.append(
                Evaluation(
                    index=i,
                    bin=f"bin {i % bins}",
                    subnet=subnet.to_dict(),
                    n_params=1,
                    scores=scores,
                    seed=0,
                    batches=1,
                    tokens=1,
                    seconds=0.1,
                )
            )
        journal.append(
            Evaluation(
                index=len(chosen),
                bin="bin 0",
                subnet=subnet.to_dict(),
                n_params=1,
                scores={},
                seed=0,
                batches=1,
                tokens=1,
                seconds=0.1,
                error="out of memory",
            )
        )
    return folder


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_trees_keep_the_rules(check):
    check(TREES)


def test_the_ranking_of_an_additive_function_is_found():
    known, unknown = sample(TEACHER, 200), sample(TEACHER, 100, seed=1)
    surrogate = fitted(Surrogate(TREES, TEACHER), known)
    assert tau(surrogate, unknown) > 0.65
    # in the same unit as the scores
    expected, measured = np.log(surrogate.predict(unknown)), np.log([loss(subnet) for subnet in unknown])
    assert np.abs(expected - measured).mean() < 0.5 * measured.std()


def test_the_same_evaluations_give_the_same_predictions():
    known, unknown = sample(TEACHER, 40), sample(TEACHER, 20, seed=1)
    one, again, other = (fitted(Surrogate(TREES, TEACHER, seed=seed), known) for seed in (1, 1, 2))
    assert (one.predict(unknown) == again.predict(unknown)).all()
    assert (one.predict(unknown) != other.predict(unknown)).any()
    fitted(one, unknown)
    fitted(one, known)  # a second fit leaves no trace
    assert (one.predict(unknown) == again.predict(unknown)).all()
    assert one.predict(unknown[:1]) == pytest.approx(one.predict(unknown)[0])


def test_trees_predict_what_scikit_learns_forest_does():
    known, unknown = sample(TEACHER, 40), sample(TEACHER, 20, seed=1)
    trees = TREES()
    targets = np.random.default_rng(0).normal(size=40)
    trees.fit(trees.read(TEACHER, known), targets, seed=3)
    features = Features(TEACHER)(unknown)
    matrix = np.stack([features[name] for name in trees.names], axis=1)
    read = trees.read(TEACHER, unknown)
    assert trees.predict(read) == pytest.approx(trees._forest.predict(matrix))
    by_tree = [tree.predict(matrix) for tree in trees._forest.estimators_]
    assert trees.deviation(read) == pytest.approx(np.std(by_tree, axis=0))


def test_candidates_without_a_score_are_passed_over():
    known = sample(TEACHER, 40)
    scores = [loss(subnet) for subnet in known]
    surrogate = Surrogate(TREES, TEACHER)
    surrogate.fit(known[: LEAST + 5], [math.inf] * 6 + scores[6 : LEAST + 5])
    assert not surrogate.is_fitted
    surrogate.fit(known, [math.inf, math.nan, *scores[2:]])
    without = fitted(Surrogate(TREES, TEACHER), known[2:])
    assert (surrogate.predict(known) == without.predict(known)).all()


def test_scores_of_any_sign_are_predicted():
    known = sample(TEACHER, 60)
    surrogate = fitted(Surrogate(TREES, TEACHER), known, lambda subnet: math.log(loss(subnet)) - 8)
    assert kendalltau(surrogate.predict(known), [loss(subnet) for subnet in known]).statistic > 0.9


def test_importance_tells_apart_what_sizes_do_not():
    ranking = random_ranking(TEACHER)
    order: Order = ranking.order

    def kept_best(subnet: SubNet) -> float:
        return 100 - len(set(subnet.n_embd.indices) & set(order.n_embd[:12].tolist()))

    known, unknown = (sample(TEACHER, n, seed, "fine_layerwise") for seed, n in enumerate((200, 100)))
    blind, seeing = (Surrogate(TREES, TEACHER, given) for given in (None, ranking))
    assert tau(fitted(seeing, known, kept_best), unknown, kept_best) > 0.6
    assert tau(fitted(seeing, known, kept_best), unknown, kept_best) > (
        tau(fitted(blind, known, kept_best), unknown, kept_best) + 0.05
    )


def test_another_teachers_search_teaches_before_the_first_evaluation(tmp_path):
    folder = write_search(tmp_path / "other", sample(LARGER, 200, seed=5))
    examples = Examples.read(folder)
    surrogate = Surrogate(TREES, TEACHER, examples=examples)
    unknown = sample(TEACHER, 100, seed=1)
    assert surrogate.is_fitted and len(examples) == 200
    ahead = tau(surrogate, unknown)
    assert ahead > 0.4
    known = sample(TEACHER, 20)
    assert tau(fitted(surrogate, known), unknown) > max(
        ahead - 0.05, tau(fitted(Surrogate(TREES, TEACHER), known), unknown)
    )
    assert tau(surrogate.unfitted(), unknown) == ahead
    assert surrogate.examples_tau() > 0.5


def test_examples_that_mislead_are_got_over(tmp_path):
    folder = write_search(tmp_path / "other", sample(TEACHER, 100, seed=5), lambda subnet: 1 / loss(subnet))
    known, unknown = sample(TEACHER, 100), sample(TEACHER, 100, seed=1)
    surrogate = Surrogate(TREES, TEACHER, examples=Examples.read(folder))
    assert tau(surrogate, unknown) < -0.4
    without = tau(fitted(Surrogate(TREES, TEACHER), known), unknown)
    assert tau(fitted(surrogate, known), unknown) == pytest.approx(without)


def test_optimism_is_in_standard_deviations_of_the_logarithms():
    known, unknown = sample(TEACHER, 40), sample(TEACHER, 20, seed=1)
    surrogate = fitted(Surrogate(TREES, TEACHER), known)
    deviation = surrogate.regressor.deviation(surrogate.regressor.read(TEACHER, unknown))
    spread = np.std(np.log([loss(subnet) for subnet in known]))
    gain = np.log(surrogate.predict(unknown)) - np.log(surrogate.predict(unknown, optimism=2.0))
    assert gain == pytest.approx(2 * deviation * spread)


def test_examples_are_those_of_each_bin(tmp_path):
    chosen = sample(TEACHER, 30)
    folder = write_search(tmp_path / "other", chosen, bins=2)
    for path in (folder, folder / "journal.jsonl"):
        examples = Examples.read(path)
        assert [choices for choices, _ in examples.bins] == [[s.to_dict() for s in chosen[i::2]] for i in range(2)]
        logs = [np.log([loss(subnet) for subnet in chosen[i::2]]) for i in range(2)]
        expected = np.concatenate([(values - values.mean()) / values.std() for values in logs])
        assert examples.targets == pytest.approx(expected)
    same, other = write_search(tmp_path / "same", chosen, bins=2), write_search(tmp_path / "more", chosen[:-1], bins=2)
    assert Examples.read(same).fingerprint == examples.fingerprint != Examples.read(other).fingerprint


def test_what_cannot_be_predicted_has_no_held_out_agreement():
    trees = TREES()
    read = trees.read(TEACHER, sample(TEACHER, 150))
    noise = np.random.default_rng(0).normal(size=150)
    assert abs(held_out_tau(TREES, read, noise)) < 0.15
    trees.fit(read, noise, seed=0)
    assert kendalltau(trees.predict(read), noise).statistic > 0.9  # it can memorise its training data


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_standardising_is_undone(scores):
    scale = Scale.of(np.array(scores))
    targets = scale.standardised(np.array(scores))
    assert scale.restored(targets) == pytest.approx(np.array(scores), rel=1e-6, abs=1e-6)
    assert targets.mean() == pytest.approx(0, abs=1e-5) and targets.std() < 1 + 1e-5


def test_agreement_is_of_candidates_with_both():
    def evaluation(i: int, measured: float | None, predicted: float | None) -> Evaluation:
        scores = {"perplexity": measured} | ({} if predicted is None else {"predicted": predicted})
        return Evaluation(
            index=i, bin="1M", subnet={}, n_params=1, scores=scores, seed=0, batches=1, tokens=1, seconds=0.1
        )

    pairs = [(3.0, None), (5.0, 6.0), (None, 2.0), (4.0, 5.0), (9.0, 5.5)]
    found, n = prediction_tau([evaluation(i, *pair) for i, pair in enumerate(pairs)])
    assert n == 3 and found == pytest.approx(kendalltau([5, 4, 9], [6, 5, 5.5]).statistic)
    assert math.isnan(prediction_tau([evaluation(0, 1.0, 1.0)])[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be the folder or journal of a search, got .*; correct it"),
        ("text\n", "line 1 of the journal .* is damaged"),
        (json.dumps({"version": 1, "teacher": {"name": "t"}}) + "\n", "was written by another version"),
    ],
)
def test_folders_that_teach_nothing_are_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "journal.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        Examples.read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_short_search_is_refused(tmp_path):
    folder = write_search(tmp_path / "short", sample(TEACHER, LEAST - 1))
    with pytest.raises(UserError, match=f"at least {LEAST} candidates with a score, .* has {LEAST - 1}; use a longer"):
        Examples.read(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "magic"}, "surrogate.mode must be none, filter or objective, got 'magic'"),
        ({"mode": "filter", "n_proposals": 0}, "surrogate.n_proposals must be at least 1"),
        ({"mode": "filter", "optimism": -1.0}, "surrogate.optimism must be 0 or more"),
        ({"mode": "filter", "refit": 0.0}, "surrogate.refit must be more than 0"),
        ({"path": Path("x")}, "surrogate.path needs a surrogate; add --surrogate.mode filter"),
        ({"n_initial": 5}, "surrogate.n_initial needs a surrogate"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SurrogateArgs(**settings)


def test_ours_come_through_the_public_door():
    assert registry.load_all("litgpt_whittle.surrogates").keys() == {"text", "trees"}
    assert registry.lookup("litgpt_whittle.surrogates", "trees") is Trees
    with pytest.raises(UserError, match="surrogate.model is an option of kind text"):
        Trees(SurrogateArgs(mode="filter", model="bert"))
