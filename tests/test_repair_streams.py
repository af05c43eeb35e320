"""Test activations of a repair in device memory and in files: the results are the same."""

import os
from dataclasses import replace

import forked
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


def make_case(name, folder):
    """Return the weights of a written teacher, and its sub-network."""
    config, sizes = SUBNETS[name]
    return read_weights(folder / "teacher"), SubNet(config, **sizes)


@pytest.fixture(params=SUBNETS)
def case(request, tmp_path):
    write_random_model(tmp_path / "teacher", SUBNETS[request.param][0], std=0.1, norm_mean=1.0)
    return make_case(request.param, tmp_path)


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


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from torch import distributed
import test_repair_streams as streams
from litgpt_whittle.repair.sequential import SequentialRepair
from litgpt_whittle.scratch import OwnActivations, Scratch
torch.set_num_threads(1)
distributed.init_process_group("gloo")
case, folder = streams.make_case({name!r}, Path({folder!r})), Path({folder!r})
for where, budgets in (("files", (0, 0)), ("memory", (2**30, 2**29)), ("both", (2**30, 20_000))):
    SequentialRepair._streams_budget = lambda self: budgets[distributed.get_rank()]
    kinds, stream = set(), Scratch.stream
    def seen(self, *args, **kwargs):
        kinds.add(type(found := stream(self, *args, **kwargs)))
        return found
    Scratch.stream = seen
    student, has_files = streams.repair(case, folder / where, refine_passes=0.2)
    Scratch.stream = stream
    assert (OwnActivations in kinds) == (where != "files") and has_files, (where, kinds)
    torch.save(student, folder / f"{{where}}-{{distributed.get_rank()}}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("name", SUBNETS)
def test_streams_in_the_memory_of_several_processes_give_the_student_of_those_in_files(name, tmp_path):
    """Also if not all of them fit, or if the processes have different amounts of memory."""
    write_random_model(tmp_path / "teacher", SUBNETS[name][0], std=0.1, norm_mean=1.0)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__), name=name, folder=str(tmp_path)))
    done = forked.run(script, n=2)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = torch.load(tmp_path / "files-0.pt")
    for where in ("files", "memory", "both"):
        for rank in range(2):
            same(torch.load(tmp_path / f"{where}-{rank}.pt"), expected)
