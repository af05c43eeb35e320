"""Test plots: they accept any journal, and show the right values."""

import math

import pytest
from architectures import ARCHITECTURES, KINDS, subnets
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from litgpt_whittle.journal import Evaluation
from litgpt_whittle.reports.blueprint import plot_architecture, rows
from litgpt_whittle.reports.plots import plot_candidates, plot_dimensions, plot_front, plot_predictions, plot_search
from litgpt_whittle.subnet import SubNet

PLOTS = (plot_search, plot_candidates, plot_dimensions, plot_predictions)
EACH = pytest.mark.parametrize("teacher", KINDS.values(), ids=KINDS)
CHOICE = {"n_embd": 8, "n_layer": "0,2-3", "head_size": 4, "n_query_groups": [1, 2, 2], "intermediate_size": 5}


def evaluation(index: int, score: float | None, bin: str = "1M-2M", **choice) -> Evaluation:
    scores = {"perplexity": score, "predicted": 2 * score if score else None}
    return Evaluation(
        index=index,
        bin=bin,
        subnet=CHOICE | choice,
        n_params=1_000_000 + index,
        scores=scores,
        seed=0,
        batches=1,
        tokens=1,
        seconds=0.1,
    )


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Record the figures as they are saved."""
    figures, save = [], Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs | {"dpi": 20})

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def texts(figure: Figure) -> list[str]:
    own = [figure.get_suptitle()]
    for axes in figure.axes:
        own += [axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)]
    own += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return own


SCORES = pytest.mark.parametrize(
    "scores",
    [[], [5.0], [3.0, None, 4e6, 2.0]]
    + [pytest.param(scores, marks=pytest.mark.slow) for scores in ([None], [5.0, 5.0, 5.0], [0.0, 9.0, -2.0])],
)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("plot", PLOTS)
@SCORES
def test_plots_take_any_journal(tmp_path, plot, scores):
    evaluations = [
        evaluation(i, score, bin) for i, score in enumerate(scores) for bin in ("1M-2M", "3M-4M")[: 1 + i % 2]
    ]
    plot(evaluations, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
@SCORES
@pytest.mark.parametrize("objectives", [("perplexity", "n_params"), ("n_params", "predicted", "perplexity", "none")])
def test_fronts_of_any_journal_are_drawn(tmp_path, scores, objectives):
    evaluations = [
        evaluation(i, score, bin) for i, score in enumerate(scores) for bin in ("1M-2M", "3M-4M")[: 1 + i % 2]
    ]
    plot_front(evaluations, tmp_path / "plot.png", objectives)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_fronts_are_marked_in_every_panel(tmp_path, drawn):
    evaluations = [evaluation(i, score) for i, score in enumerate([4.0, 3.0, None, 5.0, 2.0, 2.5])]
    plot_front(evaluations, tmp_path / "plot.png", ("perplexity", "n_params", "predicted"))
    assert drawn[0].get_suptitle() == "3 of 6 candidates on the front of perplexity, n_params and predicted"
    assert [axes.get_xlabel() for axes in drawn[0].axes] == ["n_params", "predicted"]
    front = {1_000_000: 4.0, 1_000_001: 3.0, 1_000_004: 2.0}
    for axes, xs in zip(drawn[0].axes, (front, [2 * score for score in front.values()])):
        candidates, marked = (sorted(map(tuple, dots.get_offsets().tolist())) for dots in axes.collections)
        assert marked == sorted(zip(xs, front.values())) and len(candidates) == 5
    assert axes.get_ylabel() == "" and drawn[0].axes[0].get_ylabel() == "perplexity"


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_evaluations_are_counted_from_one_in_whole_numbers(n, tmp_path, drawn):
    evaluations = [evaluation(i, 5.0 - i / 10) for i in range(n)]
    plot_search(evaluations, tmp_path / "plot.png")
    plot_candidates(evaluations, tmp_path / "plot.png")
    search, bar = drawn[0].axes[0].xaxis, drawn[1].axes[1].yaxis
    assert all(tick == int(tick) for axis in (search, bar) for tick in axis.get_majorticklocs())
    assert bar.get_view_interval().tolist() == [1, max(n, 2)]
    assert drawn[1].axes[0].collections[0].get_array().tolist() == list(range(1, n + 1))


def test_correlations_are_within_bins_and_fixed_dimensions_are_named(tmp_path, drawn):
    evaluations = [evaluation(i, 20.0 - i, n_embd=4 + i) for i in range(10)]
    evaluations += [evaluation(10 + i, 100.0 + i, "3M-4M", n_embd=4 + i) for i in range(10)]
    evaluations += [evaluation(20 + i, 200.0 + i, "5M-6M", n_embd=4 + i) for i in range(9)]  # too few for a correlation
    plot_dimensions(evaluations, tmp_path / "plot.png")
    visible = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in visible] == ["n_embd"]
    assert [text.get_text() for text in visible[0].texts] == ["ρ = −1.00", "ρ = 1.00", ""]
    assert "(the same in all: n_layer, head_size, n_head, intermediate_size)" in drawn[0].get_suptitle()
    assert texts(drawn[0])[-3:] == ["1M-2M", "3M-4M", "5M-6M"]


def test_titles_tell_what_was_found(tmp_path, drawn):
    evaluations = [evaluation(i, score) for i, score in enumerate([4.0, 3.0, None, 5.0])]
    plot_search(evaluations, tmp_path / "plot.png")
    plot_candidates(evaluations, tmp_path / "plot.png")
    plot_predictions(evaluations, tmp_path / "plot.png")
    search, candidates, predictions = map(texts, drawn)
    assert "The best of 4 candidates so far" in search and "best so far: 3.00" in search and "1 failed" in search
    assert "3 candidates, 2 on the front of perplexity and parameters" in candidates and "1 failed" in candidates
    assert "The surrogate: Kendall's τ = 1.00 over 3 candidates" in predictions


@EACH
@settings(max_examples=6)
@given(data=st.data())
def test_rows_are_the_sizes_of_the_students_layers(teacher, data):
    subnet = data.draw(subnets(teacher))
    found = {row.name: row for row in rows(subnet)}
    configs = {layer: subnet.layer_config(i) for i, layer in enumerate(subnet.layers)}
    for layer in range(teacher.n_layer):
        is_dense = teacher.mlp_class_name != "LLaMAMoE" or layer < (teacher.first_k_dense_replace or 0)
        width = "neurons" if is_dense else "neurons/expert"
        for column, config in (("of", teacher), ("kept", configs.get(layer))):
            expected = {"heads": config.n_head, "query groups": config.n_query_groups} if config else {}
            if config and is_dense:
                expected["neurons"] = config.intermediate_size
            elif config:
                expected |= {"experts": config.n_expert}
                expected[width] = config.moe_intermediate_size or config.intermediate_size
            assert {n: row.__dict__[column][layer] for n, row in found.items()} == {
                n: expected.get(n, 0) for n in found
            }
    assert ("query groups" in found) == (teacher.n_head != teacher.n_query_groups)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "latent"])
def test_every_kind_of_sub_network_is_drawn(name, tmp_path, drawn):
    teacher = ARCHITECTURES[name]
    groups = [1, min(2, teacher.n_query_groups)]
    layerwise = SubNet(teacher, n_embd="3-9", n_layer="1,3", n_query_groups=groups)
    for subnet in (SubNet.full(teacher), SubNet(teacher, n_layer="2-2"), layerwise):
        plot_architecture(subnet, tmp_path / "plot.png", "The best")
    for figure, n_dropped in zip(drawn, (0, teacher.n_layer - 1, teacher.n_layer - 2)):
        heads = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("heads"))
        hatched = [bar for bar in heads.patches if bar.get_hatch() and bar.get_height() > 0]
        assert len(hatched) == n_dropped and all(math.isclose(bar.get_height(), teacher.n_head) for bar in hatched)
