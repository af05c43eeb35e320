"""Test sharded checkpoints: written and read by any number of processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt_whittle.errors import UserError
from litgpt_whittle.sharded_checkpoint import (
    Rows,
    has_parts,
    map_tensors,
    read_parts,
    save_parts,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.data())
def test_rows_are_those_of_the_whole_tensor(lengths, data):
    whole = torch.arange(3 * sum(lengths)).view(-1, 3)
    rows = Rows(list(whole.split(lengths)))
    assert rows.shape == whole.shape and torch.equal(rows[:], whole)
    start, stop = (data.draw(st.integers(0, sum(lengths) + 2)) for _ in range(2))
    assert torch.equal(rows[start:stop], whole[start:stop])


def test_one_process_reads_what_it_wrote(tmp_path):
    tree = {"weights": {"a": torch.rand(3, 2)}, "training": {"step": 3, "more": [torch.tensor(1.5), ("x", None)]}}
    save_parts(tmp_path / "out", tree, lambda folder: (folder / "note").write_text("beside"))
    assert has_parts(tmp_path / "out") and (tmp_path / "out/note").read_text() == "beside"
    weights, training = (read_parts(tmp_path / "out", key) for key in tree)
    assert torch.equal(weights["a"], tree["weights"]["a"])
    assert training == {"step": 3, "more": [torch.tensor(1.5), ("x", None)]}


def test_a_failure_leaves_what_was_there(tmp_path):
    save_parts(tmp_path / "out", {"weights": torch.zeros(2)}, lambda folder: None)

    def fail(folder):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_parts(tmp_path / "out", {"weights": torch.ones(2)}, fail)
    assert torch.equal(read_parts(tmp_path / "out", "weights"), torch.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_missing_damaged_and_malicious_parts_are_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (np.testing.assert_, (False, "code ran"))

    def write(i, content):
        torch.save(content, tmp_path / f"part-0000{i}-of-00002.pth")

    write(1, {"weights": {}})
    with pytest.raises(UserError, match="lacks part-00000-of-00002.pth"):
        read_parts(tmp_path, "weights")
    (tmp_path / "part-00000-of-00002.pth").write_bytes(b"torn")
    with pytest.raises(UserError, match="part-00000-of-00002.pth' cannot be read"):
        read_parts(tmp_path, "weights")
    write(0, {"weights": {"a": Malicious()}})
    with pytest.raises(UserError, match="cannot be read"):
        read_parts(tmp_path, "weights")


def test_tensors_are_mapped_wherever_they_are():
    tree = {"a": [torch.ones(1), (torch.ones(2), 5)], "b": {"c": torch.ones(3)}, "d": "text"}
    assert map_tensors(tree, len) == {"a": [1, (2, 5)], "b": {"c": 3}, "d": "text"}
