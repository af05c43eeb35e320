"""What compiling needs and is missing is reported before anything else happens."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from test_train import run

from litgpt_whittle.errors import UserError
from litgpt_whittle.searching.selection import SelectionArgs, parse_rungs
from litgpt_whittle.training.compiler import check_compiler


@pytest.fixture
def no_compiler():
    """The state of PyTorch on a machine without g++ and with CXX unset, or set to nothing that runs."""
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield


def test_without_a_compiler_a_run_stops_before_it_writes_anything(tmp_path, no_compiler):
    for dry_run in (False, True):
        with pytest.raises(UserError, match=r"compile needs a C\+\+ compiler .* use --compile false"):
            run(tmp_path / "out", compile=True, dry_run=dry_run)
    assert not any(tmp_path.iterdir())


def test_without_a_compiler_a_search_with_a_selection_stops_at_once(tmp_path, no_compiler):
    path = tmp_path / "distill.yaml"
    path.write_text("data: HFText\ncompile: true\n")
    with pytest.raises(UserError, match="use --compile false"):
        parse_rungs(SelectionArgs(rungs=["2x100k"], config=path))
    path.write_text("data: HFText\ncompile: false\n")
    parse_rungs(SelectionArgs(rungs=["2x100k"], config=path))


def test_what_is_not_compiled_needs_no_compiler(tmp_path, no_compiler, monkeypatch):
    run(tmp_path / "out", compile=False)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    check_compiler(torch.device("cpu"))


def test_on_a_gpu_triton_and_a_c_compiler_are_needed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="compile needs the package triton"):
        check_compiler(torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="compile needs a C compiler"):
        check_compiler(torch.device("cuda"))


def test_pythons_header_files_are_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="Python's header files"):
        check_compiler(torch.device("cuda"))
    Path(tmp_path, "Python.h").touch()
    check_compiler(torch.device("cuda"))
