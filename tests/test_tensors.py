"""Test saved tensors: always in CPU memory, because a device's tensor class cannot be loaded elsewhere."""

import subprocess
import sys

import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle.checkpoint import save_checkpoint
from litgpt_whittle.scratch import Scratch
from litgpt_whittle.sharded_checkpoint import (
    part_paths,
    save_parts,
)
from litgpt_whittle.supergpt import tie
from litgpt_whittle.tensors import save_tensors


class OnDevice(torch.Tensor):
    """A tensor that reports a GPU as its device; without its device's class, its file cannot be loaded."""

    @staticmethod
    def of(values):
        return values.as_subclass(OnDevice)

    @property
    def device(self):
        return torch.device("cuda", 0)

    def cpu(self):
        return torch.Tensor.as_subclass(self, torch.Tensor).clone()


def test_a_file_of_a_devices_tensors_loads_without_the_device(tmp_path):
    values = torch.randn(3, 4)
    tree = {"a": OnDevice.of(values), "more": [(OnDevice.of(values[0]), 3), "text", torch.arange(2)]}
    save_tensors(tree, tmp_path / "file")
    loaded = torch.load(tmp_path / "file", weights_only=True)  # rejects classes other than PyTorch's own
    assert torch.equal(loaded["a"], values) and torch.equal(loaded["more"][0][0], values[0])
    assert loaded["more"][0][1:] == (3,) and loaded["more"][1] == "text" and loaded["more"][2].tolist() == [0, 1]


def test_tied_tensors_of_a_device_are_stored_once(tmp_path):
    weight = OnDevice.of(torch.randn(64, 64))
    save_tensors({"one": weight, "other": weight.detach()}, tmp_path / "tied")
    save_tensors({"one": weight, "other": weight.T}, tmp_path / "transposed")
    assert (tmp_path / "tied").stat().st_size < 1.5 * 64 * 64 * 4
    transposed = torch.load(tmp_path / "transposed", weights_only=True)
    assert torch.equal(transposed["one"].T, transposed["other"])


def test_scratch_of_a_devices_tensors_loads_without_the_device(tmp_path):
    scratch, values = Scratch(tmp_path / "scratch", "key"), torch.randn(2)
    scratch.save("basis", {"matrix": OnDevice.of(values)})
    assert torch.equal(scratch.load("basis")["matrix"], values)


def test_a_checkpoint_of_a_devices_weights_is_one_of_stock_litgpt(tmp_path):
    config = Config(n_layer=1, n_embd=16, n_head=2, block_size=8, vocab_size=32, padded_vocab_size=32)
    model = tie(GPT(config))
    weights = {name: OnDevice.of(tensor.detach()) for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # as in the training checkpoint of a tied model
    state = {"optimizer": {"state": {0: {"exp_avg": OnDevice.of(torch.ones(2))}}}}
    save_checkpoint(tmp_path / "out", config, weights, extra={"state.pth": state}, tied=True)
    loaded = torch.load(tmp_path / "out/lit_model.pth", weights_only=True)
    assert loaded["lm_head.weight"].data_ptr() == loaded["transformer.wte.weight"].data_ptr()
    stock, ids = GPT(config), torch.arange(8)[None]
    stock.load_state_dict(loaded)
    assert torch.equal(stock(ids), model(ids))
    saved = torch.load(tmp_path / "out/state.pth", weights_only=True)
    assert saved["optimizer"]["state"][0]["exp_avg"].tolist() == [1, 1]


def test_a_part_of_a_devices_tensors_loads_without_the_device(tmp_path):
    values = torch.randn(3)
    save_parts(tmp_path / "out", {"training": {"helper": OnDevice.of(values)}}, lambda folder: None)
    (part,) = part_paths(tmp_path / "out")
    assert torch.equal(torch.load(part, weights_only=True)["training"]["helper"], values)


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from litgpt_whittle.files import write_text
from litgpt_whittle.plugin import show_user_errors_in_one_line
from litgpt_whittle.tensors import save_tensors
show_user_errors_in_one_line(set())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # no file may be longer
path = Path(sys.argv[1])
{write}
"""


@pytest.mark.parametrize(
    "write",
    [
        "save_tensors(torch.ones(1000), path / 'file')",
        "import errno; raise OSError(errno.ENOSPC, 'No space left on device', str(path / 'file'))",
    ],
)
def test_a_full_disk_ends_in_one_line(tmp_path, write):
    ran = subprocess.run(
        [sys.executable, "-c", FULL.format(write=write), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1 and len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith(f"error: {tmp_path}/file cannot be written (") and "make room" in ran.stderr


def test_text_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    write = "try: write_text(path / 'file', 'x' * 10_000)\nexcept OSError: print('failed', list(path.iterdir()))"
    ran = subprocess.run(
        [sys.executable, "-c", FULL.format(write=write), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.stdout == "failed []\n", ran.stderr
