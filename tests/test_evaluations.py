"""Test reading a search's evaluations."""

from statistics import mean

import pytest
from architectures import KINDS, keeps, subnets
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt_whittle.evaluations import (
    best_of,
    bins_of,
    fronts_of,
    mean_sizes,
    pareto_front,
    scored,
)
from litgpt_whittle.journal import Evaluation
from litgpt_whittle.unit_index import n_units

EACH = pytest.mark.parametrize("teacher", KINDS.values(), ids=KINDS)


def evaluation(index: int, n: int, perplexity: float | None, bin: str = "1M-2M") -> Evaluation:
    return Evaluation(
        index=index,
        bin=bin,
        subnet={},
        n_params=n,
        scores={"perplexity": perplexity},
        seed=0,
        batches=1,
        tokens=1,
        seconds=0.1,
    )


def is_beaten(point: tuple, others: list[tuple]) -> bool:
    return any(other != point and all(a <= b for a, b in zip(other, point)) for other in others)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[st.integers(0, 4)] * n), max_size=30)))
def test_the_front_is_what_nothing_beats_in_all(points):
    front = pareto_front(points)
    assert [points[i] for i in front] == sorted({point for point in points if not is_beaten(point, points)})
    assert front == [points.index(points[i]) for i in front]  # the first one of equals


def test_fronts_are_those_of_each_bin_without_what_failed():
    evaluations = [evaluation(0, 5, 9.0), evaluation(1, 4, None), evaluation(2, 6, 8.0), evaluation(3, 6, 8.5)]
    evaluations += [evaluation(4, 1, 9.5, "3M-4M"), evaluation(5, 2, 9.0, "3M-4M"), evaluation(6, 1, None, "5M-6M")]
    fronts = fronts_of(evaluations, ["perplexity", "n_params"])
    assert {bin: [e.index for e in front] for bin, front in fronts.items()} == {"1M-2M": [2, 0], "3M-4M": [5, 4]}
    assert fronts_of(evaluations, ["perplexity", "unheard_of"]) == {}


def test_the_best_of_each_bin_is_the_earliest_of_equals():
    evaluations = [evaluation(0, 5, None), evaluation(1, 6, 4.0), evaluation(2, 7, 4.0), evaluation(3, 8, 9.0, "3M-4M")]
    evaluations.append(evaluation(4, 9, None, "5M-6M"))
    assert {bin: best.index for bin, best in best_of(evaluations).items()} == {"1M-2M": 1, "3M-4M": 3}
    assert bins_of(evaluations) == ["1M-2M", "3M-4M", "5M-6M"] and len(scored(evaluations)) == 3


@EACH
@settings(max_examples=10)
@given(data=st.data())
def test_mean_sizes_are_those_of_the_students_layers(teacher, data):
    subnet = data.draw(subnets(teacher, sublayers=True))
    layers = [subnet.layer(i) for i in range(len(subnet))]
    configs = [subnet.layer_config(i) for i in range(len(subnet))]
    expected = {"n_embd": len(subnet.n_embd), "n_layer": len(subnet), "head_size": len(subnet.head_size)}
    expected["n_head"] = mean(config.n_head for config, layer in zip(configs, layers) if "attn" in layer.parts)
    has_own_width = teacher.moe_intermediate_size is not None
    for config, layer in zip(configs, layers):
        if "mlp" not in layer.parts:
            continue
        is_expert = layer.n_expert is not None and has_own_width
        width = "moe_intermediate_size" if is_expert else "intermediate_size"
        expected.setdefault(width, []).append(getattr(config, width))
        if layer.n_expert is not None:
            expected.setdefault("n_expert", []).append(config.n_expert)
    expected = {name: mean(value) if isinstance(value, list) else value for name, value in expected.items()}
    assert mean_sizes(subnet.to_dict()) == pytest.approx(expected)


@given(keep=keeps(40))
def test_units_are_counted_without_listing_them(keep):
    assert n_units(keep.to_yaml()) == len(keep)
