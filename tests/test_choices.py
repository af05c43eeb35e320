"""Test the numeric encoding of sub-networks: decoding returns the same sub-network."""

from typing import get_args

import numpy as np
import pytest
from architectures import ARCHITECTURES, KINDS
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt_whittle.spaces.args import (
    SizeArgs,
    SpaceArgs,
)
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.sizes import SizeSpace
from litgpt_whittle.spaces.space import Space, SpaceName
from litgpt_whittle.strategies.choices import Choices
from litgpt_whittle.subnet import layer_sizes
from litgpt_whittle.testing.inputs import random_ranking

EACH = pytest.mark.parametrize("teacher", KINDS.values(), ids=KINDS)


def draw_space(data, teacher) -> Space:
    """Draw any space of a teacher, over a bin anywhere in its range."""
    name = data.draw(st.sampled_from(get_args(SpaceName)))
    args = SpaceArgs(fixed=[], layers=data.draw(st.sampled_from(["any", "first", "best"])))
    sizes = SizeSpace(teacher, name.endswith("layerwise"), False, args, range(teacher.n_layer))
    lo = data.draw(st.integers(sizes.smallest, sizes.largest))
    return Space(teacher, name, Bin(lo, max(lo + lo // 20, lo + 200)), args=args, order=random_ranking(teacher).order)


@EACH
@settings(max_examples=3)
@given(data=st.data())
def test_a_sub_network_is_built_again_from_its_numbers(teacher, data):
    space, rng = draw_space(data, teacher), np.random.default_rng(data.draw(st.integers(0, 2**32)))
    choices, subnet = Choices(space), space.sample(rng)
    numbers = choices.of(subnet)
    assert list(numbers) == list(choices.bounds)
    assert all(lo <= numbers[name] <= hi for name, (lo, hi) in choices.bounds.items())
    again = choices.build(rng, numbers)
    assert choices.of(again) == numbers and space.sizes_of(again) == space.sizes_of(subnet)
    assert choices.build(rng, numbers, units_of=subnet) == subnet


@EACH
@settings(max_examples=3)
@given(data=st.data())
def test_the_numbers_are_the_sub_networks_sizes(teacher, data):
    space = draw_space(data, teacher)
    subnet = space.sample(np.random.default_rng(data.draw(st.integers(0, 2**32))))
    numbers = Choices(space).of(subnet)
    names = {name.partition(".")[0] for name in numbers}
    assert numbers.pop("n_embd") == len(subnet.n_embd)
    assert numbers.pop("head_size", len(subnet.head_size)) == len(subnet.head_size)
    if "n_layer" in names:
        assert numbers.pop("n_layer") == len(subnet)
    for layer in range(teacher.n_layer if "layer" in names else 0):
        assert numbers.pop(f"layer.{layer}") == (layer in subnet.layers)
    for i, layer in enumerate(subnet.layers):
        keep = subnet.layer(i)
        for name in layer_sizes(teacher, layer):
            field = "intermediate_size" if name == "moe_intermediate_size" else name
            for key in (name, f"{name}.{layer}"):
                assert numbers.get(key, len(getattr(keep, field))) == len(getattr(keep, field))


@EACH
@settings(max_examples=3)
@given(data=st.data())
def test_any_numbers_make_a_sub_network_of_the_bin(teacher, data):
    space = draw_space(data, teacher)
    choices, rng = Choices(space), np.random.default_rng(data.draw(st.integers(0, 2**32)))
    numbers = {name: int(rng.integers(lo, hi, endpoint=True)) for name, (lo, hi) in choices.bounds.items()}
    assert space.n_params(choices.build(rng, numbers)) in space.bin
    assert space.n_params(choices.build(rng, numbers, units_of=space.sample(rng), exchange=1.0)) in space.bin


def test_what_cannot_differ_is_no_choice():
    teacher = ARCHITECTURES["Llama-3.1-8B"]
    args = SpaceArgs(fixed=["n_embd", "head_size", "n_layer", "heads_per_group"], smallest=SizeArgs(n_query_groups=2))
    whole = SizeSpace(teacher, True, False, args)
    space = Space(teacher, "coarse_layerwise", Bin(whole.smallest, whole.largest), args=args)
    assert set(Choices(space).bounds) == {f"intermediate_size.{layer}" for layer in range(teacher.n_layer)}
