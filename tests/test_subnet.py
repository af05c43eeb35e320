"""Test sub-networks as values: parsing, writing, comparison, rejected input, and counts without a model."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from architectures import ARCHITECTURES, keeps, subnets
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import num_parameters

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import to_yaml
from litgpt_whittle.index_plan import layer_params, n_params, plan, root_params
from litgpt_whittle.rope import cut_head, legal_head_sizes
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import student_model
from litgpt_whittle.unit_index import UnitIndex

PYTHIA = Config.from_name("pythia-14m", n_layer=4, n_embd=32, n_head=4, intermediate_size=64, block_size=32)
EACH = pytest.mark.parametrize("teacher", ARCHITECTURES.values(), ids=ARCHITECTURES)


@given(st.data())
def test_keep_survives_writing_and_reading(data):
    keep = data.draw(keeps(data.draw(st.integers(1, 40))))
    again = UnitIndex.parse(keep.to_yaml())
    assert again == keep and hash(again) == hash(keep) and len(again) == len(keep.indices)
    assert UnitIndex(keep.indices) == keep == UnitIndex(keep.indices.tolist())


def test_keep_reads_ranges():
    np.testing.assert_array_equal(UnitIndex.parse("0-3, 6,8-9").indices, [0, 1, 2, 3, 6, 8, 9])
    assert UnitIndex.parse("0-511") == UnitIndex.parse(512) == UnitIndex.parse("512") == UnitIndex(range(512))
    assert UnitIndex([3]) != UnitIndex(1) and UnitIndex.parse(str(UnitIndex([3]))) == UnitIndex([3])


@EACH
@settings(max_examples=10)
@given(data=st.data())
def test_sub_network_survives_its_yaml(teacher, data, tmp_path_factory):
    subnet = data.draw(subnets(teacher, sublayers=True))
    path = tmp_path_factory.mktemp("subnet") / "s.yaml"
    subnet.save(path, perplexity=3.5)
    again = SubNet.load(path, teacher)
    assert again == subnet and hash(again) == hash(subnet)
    assert yaml.safe_load(path.read_text())["provenance"]["perplexity"] == 3.5


def test_uniform_sub_network_fits_in_six_lines():
    subnet = SubNet(PYTHIA, n_embd=16, n_layer="0,2-3", n_query_groups=2, head_size=4, intermediate_size="0-7,16-31")
    assert len(to_yaml(subnet.to_dict()).splitlines()) <= 6


def test_lists_that_agree_are_the_uniform_sub_network():
    assert SubNet(PYTHIA, n_layer=2, intermediate_size=[8, 8]) == SubNet(PYTHIA, n_layer=2, intermediate_size=8)
    assert SubNet(PYTHIA, n_layer=2, intermediate_size=[8, 9]) != SubNet(PYTHIA, n_layer=2, intermediate_size=8)
    assert SubNet(PYTHIA) == SubNet.full(PYTHIA)


@EACH
@settings(max_examples=10)
@given(data=st.data())
def test_plan_counts_the_parameters_of_the_model_itself(teacher, data):
    subnet, tied = data.draw(subnets(teacher, sublayers=True)), data.draw(st.booleans())
    with torch.device("meta"):
        student = student_model(subnet)
    if tied:
        student.lm_head.weight = student.transformer.wte.weight
    assert n_params(teacher, subnet, tied) == num_parameters(student)
    slices = plan(teacher, subnet, tied)
    assert {name: take.shape for name, take in slices.items()} == {
        k: tuple(v.shape) for k, v in student.state_dict().items()
    }


@EACH
def test_counts_are_affine_in_every_size(teacher):
    last = teacher.n_layer - 1
    full = SubNet(teacher).layer(last).sizes
    sizes = [teacher.n_embd, teacher.head_size, *full]

    def count(**changed):
        return layer_params(teacher, last, *[changed.get(str(i), size) for i, size in enumerate(sizes)])

    for i, size in enumerate(sizes):
        if size >= 4 and not (i == 1 and teacher.latent_attention):
            step = teacher.n_expert_groups or 1 if i == 5 else 1
            counts = [count(**{str(i): size - k * step}) for k in range(3)]
            assert counts[0] - counts[1] == counts[1] - counts[2] > 0
    total = sum(layer_params(teacher, i, *sizes[:2], *SubNet(teacher).layer(i).sizes) for i in range(teacher.n_layer))
    assert root_params(teacher, teacher.n_embd) + total == n_params(teacher, SubNet(teacher))


@EACH
def test_kept_rotary_pairs_turn_at_the_teachers_frequencies(teacher):
    full = GPT(dataclasses.replace(teacher, n_layer=0)).rope_cache()
    half = teacher.rope_n_elem // 2
    for size in legal_head_sizes(teacher):
        cut = cut_head(teacher, size)
        student = dataclasses.replace(teacher, n_layer=0, **cut.config_changes)
        assert student.head_size == size == len(cut.dims)
        if teacher.latent_attention:
            continue
        rotary = cut.dims[cut.dims < teacher.rope_n_elem]
        assert len(rotary) == student.rope_n_elem
        if teacher.rope_interleave:  # pair j is (2j, 2j + 1), its angle is column j
            pairs = rotary[::2] // 2
            np.testing.assert_array_equal(rotary[1::2], rotary[::2] + 1)
        else:  # pair j is (j, j + half)
            pairs = rotary[: len(rotary) // 2]
            np.testing.assert_array_equal(rotary[len(rotary) // 2 :], pairs + half)
        for ours, theirs in zip(GPT(student).rope_cache(), full):
            torch.testing.assert_close(ours[:, : len(pairs)], theirs[:, pairs], rtol=1e-4, atol=1e-5)


def test_chosen_head_dimensions_keep_whole_pairs():
    teacher = ARCHITECTURES["open_llama_3b"]  # 16 dimensions, all rotary
    assert SubNet(teacher, head_size="0,4,8,12").config.rope_base == pytest.approx(10000 ** (4 * 4 / 16))
    for choice, problem in (("0,4,8", "whole pairs"), ("1,3,9,11", "0, s, 2s"), (5, "even")):
        with pytest.raises(UserError, match=problem):
            SubNet(teacher, head_size=choice)


def test_attention_kind_follows_its_layer():
    teacher = ARCHITECTURES["Gemma-3-1b-it"]
    config = SubNet(teacher, n_layer="1,5,6").config
    assert config.sliding_window_indices == [teacher.sliding_window_indices[i] for i in (1, 5, 6)]
    assert config.rope_indices == [teacher.rope_indices[i] for i in (1, 5, 6)]


LATENT, MIXTRAL = ARCHITECTURES["latent"], ARCHITECTURES["Mixtral-8x7B-v0.1"]


@pytest.mark.parametrize(
    ("teacher", "choice", "problem"),
    [
        (PYTHIA, {"n_embd": 33}, "n_embd must lie within the teacher's 32, got 33"),
        (PYTHIA, {"n_embd": "0-3,32"}, "got index 32"),
        (PYTHIA, {"n_embd": 0}, "at least one unit"),
        (PYTHIA, {"n_layer": "2,1"}, "must be sorted, got 2 before 1"),
        (PYTHIA, {"n_layer": "1,1"}, "must be distinct, got 1 twice"),
        (PYTHIA, {"n_layer": ""}, "ranges look like"),
        (PYTHIA, {"n_layer": "3-1"}, "must ascend"),
        (PYTHIA, {"n_layer": [0, 1]}, "a number or ranges"),
        (PYTHIA, {"n_embd": 1.5}, "a number or ranges"),
        (PYTHIA, {"n_embd": True}, "a number or ranges"),
        (PYTHIA, {"heads_per_group": 2}, "heads_per_group must lie within the teacher's 1"),
        (PYTHIA, {"n_layer": 2, "intermediate_size": [8, 8, 8]}, "3 entries for 2 kept layers"),
        (PYTHIA, {"n_expert": 2}, "no kept layer of the teacher has n_expert"),
        (LATENT, {"head_size": 4}, "cannot shrink in a model with latent attention"),
        (LATENT, {"n_expert": 5}, "multiple of n_expert_groups = 2"),
        (LATENT, {"n_expert": 2}, "n_expert must be at least 4, 2 in each of the 2 expert groups, got 2"),
        (LATENT, {"n_expert": "0-2,4"}, r"the same number, got \[3, 1\]"),
        (LATENT, {"n_layer": 3, "n_expert": [4, 4, 4]}, "layer 0 of the teacher has no n_expert"),
        (MIXTRAL, {"n_expert": 1}, "at least n_expert_per_token = 2"),
        (MIXTRAL, {"n_expert": [2, 3, 2, 2]}, "same number in all layers"),
    ],
)
def test_illegal_choices_are_named(teacher, choice, problem):
    with pytest.raises(UserError, match=problem) as error:
        SubNet(teacher, **choice)
    assert "\n" not in str(error.value)


def test_files_that_are_no_sub_network_are_named(tmp_path):
    path = tmp_path / "s.yaml"
    with pytest.raises(UserError, match="cannot read the sub-network"):
        SubNet.load(path, PYTHIA)
    for text, problem in (("a: [", "is not YAML"), ("5", "is not a sub-network"), ("n_head: 2", "has no 'n_head'")):
        path.write_text(text)
        with pytest.raises(UserError, match=problem):
            SubNet.load(path, PYTHIA)
    SubNet(PYTHIA, n_embd=8).save(path)
    with pytest.raises(UserError, match="is a sub-network of 'pythia-14m'"):
        SubNet.load(path, dataclasses.replace(PYTHIA, n_layer=3))


def test_unknown_modules_are_refused(monkeypatch):
    from litgpt_whittle import index_plan

    monkeypatch.delitem(index_plan.RULES, "mlp.fc")
    with pytest.raises(TypeError, match=r"No slicing rule for 'mlp\.fc'"):
        plan(PYTHIA, SubNet(PYTHIA, n_embd=8))
