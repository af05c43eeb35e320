"""Test manifests: what differs between two, and their digests."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from litgpt_whittle.errors import UserError
from litgpt_whittle.manifest import changes, check_unchanged, digest

VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
NAMES = st.sampled_from(["data", "train", "codec", "seed"])
MANIFESTS = st.dictionaries(NAMES, st.recursive(VALUES, lambda inner: st.dictionaries(NAMES, inner, max_size=2)))


@given(MANIFESTS)
def test_a_manifest_has_no_changes_against_itself(manifest):
    assert changes(manifest, dict(manifest)) == []
    check_unchanged("a run", manifest, dict(manifest), "begin another")


@given(MANIFESTS, st.sampled_from(["codec", "seed"]), st.integers(), st.integers())
def test_one_changed_setting_is_named_wherever_it_is(manifest, name, was, now):
    saved, current = ({**manifest, "train": {"lr": 1, name: value}} for value in (was, now))
    expected = [] if was == now else [f"train.{name} was {was} and is {now}"]
    assert changes(saved, current) == expected and (digest(saved) == digest(current)) == (was == now)


def test_names_without_settings_and_missing_settings_are_changes():
    assert changes({"codec": {"full": {}}}, {"codec": {"other": {}}}) == [
        "codec.other was None and is {}",
        "codec.full was {} and is None",
    ]
    assert digest({"codec": {"full": {}}}) != digest({"codec": {"other": {}}})
    with pytest.raises(
        UserError, match="^a run must keep its settings: seed was 1 and is 2; change back, or begin anew$"
    ):
        check_unchanged("a run", {"seed": 1}, {"seed": 2}, "begin anew")
