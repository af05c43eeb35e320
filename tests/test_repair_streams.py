"""Test activations of a repair in device memory and in files: the results are the same."""

from dataclasses import replace

import pytest
import torch
from checkpoints import write_random_model
from litgpt.config import Config
from pretended_device import CAN_PRETEND, NAME, pretended_device
from test_repair import windows

from litgpt_whittle.calibration import Calibration
from litgpt_whittle.checkpoint import read_weights
from litgpt_whittle.repair import sequential
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.repair.sequential import SequentialRepair
from litgpt_whittle.scratch import Scratch
from litgpt_whittle.subnet import SubNet

TEACHER = Config.from_name(
    "Llama-3.2-1B", n_layer=4, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=24, block_size=8,
    vocab_size=61, padded_vocab_size=64,
)  # fmt: skip
FULL = replace(TEACHER, n_layer=3)
SUBNETS = {
    "dropped_first": (TEACHER, dict(n_embd=24, n_layer="1,3-3", intermediate_size=16)),
    "copied_first": (FULL, dict(intermediate_size=[24, 16, 12])),
}


@pytest.fixture(params=SUBNETS)
def case(request, tmp_path):
    config, sizes = SUBNETS[request.param]
    write_random_model(tmp_path / "teacher", config, std=0.1, norm_mean=1.0)
    return read_weights(tmp_path / "teacher"), SubNet(config, **sizes)


def repair(case, folder, device="cpu", **args):
    """Repair; return the student, and whether activation files were used."""
    weights, subnet = case
    files, calibration = [], Calibration(windows(subnet.teacher, 24, 8), 6, device)
    job = SequentialRepair(weights, subnet, calibration, RepairArgs(**args), Scratch(folder, "key"))
    finish = job._finish
    job._finish = lambda *args: (finish(*args), files.extend(folder.glob("*.f32")))
    return job.run(progress=False).weights, bool(files)


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.skipif(not CAN_PRETEND, reason="this PyTorch lets no Python code register a device")
@pytest.mark.filterwarnings("ignore:.* calibration tokens are fewer")
def test_streams_in_a_devices_memory_give_the_student_of_those_in_files_with_fewer_waits(tmp_path, monkeypatch):
    config = replace(TEACHER, n_layer=2)
    write_random_model(tmp_path / "teacher", config, std=0.1, norm_mean=1.0)
    case, found, waits = (read_weights(tmp_path / "teacher"), SubNet(config, n_embd=24, n_layer=1)), {}, {}
    for where in ("memory", "files"):
        with pretended_device() as seen, monkeypatch.context() as patch:
            if where == "files":
                patch.setattr(SequentialRepair, "_streams_budget", lambda self: 0)
            found[where], has_files = repair(case, tmp_path / where, NAME, head_passes=0)
        waits[where] = seen.total("sync")
        assert has_files == (where == "files")
    same(found["memory"], found["files"])
    assert waits["memory"] <= waits["files"] - 50, waits  # the copies to the files


@pytest.mark.parametrize("budgets", [(2**30, 2**30), (2**30, 0), (10_000, 10_000)])
@pytest.mark.filterwarnings("ignore:.* calibration tokens are fewer")
def test_an_interrupted_repair_computes_lost_streams_again(case, budgets, tmp_path, monkeypatch):
    """Interrupted after its second layer, and again while it recomputes the streams."""
    expected, has_files = repair(case, tmp_path / "whole", refine_passes=0.2)
    assert has_files  # always on a CPU
    one, embed, n = SequentialRepair._repair_layer, sequential.NonBlockModules.embed, []

    def dying(self, i):
        if i == 1:
            raise KeyboardInterrupt
        return one(self, i)

    def dying_too(self, ids):
        n.append(1)
        if len(n) == 3:
            raise KeyboardInterrupt
        return embed(self, ids)

    monkeypatch.setattr(SequentialRepair, "_streams_budget", lambda self: budgets[0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SequentialRepair, "_repair_layer", dying)
        repair(case, tmp_path / "out", refine_passes=0.2)
    monkeypatch.setattr(SequentialRepair, "_streams_budget", lambda self: budgets[1])
    with monkeypatch.context() as patch:
        patch.setattr(sequential.NonBlockModules, "embed", dying_too)
        try:
            repair(case, tmp_path / "out", refine_passes=0.2)
        except KeyboardInterrupt:
            assert budgets[0] != 2**30 or len(n) == 3
    found, _ = repair(case, tmp_path / "out", refine_passes=0.2)
    same(found, expected)
