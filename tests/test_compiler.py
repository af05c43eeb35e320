"""Test that missing requirements of compilation are reported first."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from checkpoints import write_random_model
from litgpt.config import Config
from litgpt.model import GPT
from test_pretended_device import SEQ, TEACHERS, distilled, same_losses
from test_train import run

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.commands import distill
from litgpt_whittle.commands.distill import StudentScore
from litgpt_whittle.distillation.head import LossModel
from litgpt_whittle.distillation.hidden import Place
from litgpt_whittle.errors import UserError
from litgpt_whittle.searching.selection import SelectionArgs, parse_rungs
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.training.compiler import check_compiler
from litgpt_whittle.training.teacher import LiveTeacher


@pytest.fixture
def no_compiler():
    """Simulate a machine without g++, with CXX unset or set to a program that does not run."""
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


LLAMA = Config.from_name(
    "Llama-3.2-1B", n_layer=2, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=24, block_size=16,
    vocab_size=61, padded_vocab_size=64,
)  # fmt: skip


@pytest.fixture
def graphs(monkeypatch):
    """Record the compiled graphs, with a backend that runs them unchanged."""
    torch.compiler.reset()
    found, compile = [], torch.compile
    backend = lambda graph, _: found.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", lambda model, **settings: compile(model, **settings | {"backend": backend}))
    return found


@pytest.mark.parametrize("is_watched", [False, True])
def test_the_compiled_teacher_is_one_graph_with_the_outputs_of_litgpts_model(graphs, is_watched, tmp_path):
    """Batches of other shapes, such as the last one of a validation, are not compiled."""
    write_random_model(tmp_path, LLAMA, std=0.1, norm_mean=1.0)
    teacher = LiveTeacher(tmp_path, 16, torch.float32, torch.device("cpu"))
    stock, inputs = load_model(tmp_path), []
    stock.transformer.h[1].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    if is_watched:
        teacher.watch([Place(0, "block")])
    teacher.compile(4, 16)
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 16), (2, 16), (4, 9), (4, 16), (1, 5)):
        ids = torch.randint(61, shape, generator=generator)
        said, logits = teacher(ids), stock(ids).flatten(0, 1)
        torch.testing.assert_close(said.chunk(0, len(logits)), logits)
        if is_watched:
            torch.testing.assert_close(said.streams[Place(0, "block")], inputs[-1])
        torch.testing.assert_close(
            teacher.losses(ids, ids).ce, torch.nn.functional.cross_entropy(logits, ids.flatten())
        )
    assert len(graphs) == 1


def test_validation_batches_of_other_shapes_are_not_compiled(graphs):
    stock = GPT(LLAMA).eval()
    score = StudentScore(torch.compile(LossModel(stock)).eval(), torch.Size((4, 16)))
    for shape in ((4, 16), (2, 16), (4, 9), (4, 16), (1, 5)):
        ids = torch.randint(61, shape, generator=torch.Generator().manual_seed(0))
        expected = torch.nn.functional.cross_entropy(stock(ids).flatten(0, 1), ids.flatten())
        with torch.no_grad():
            torch.testing.assert_close(score(ids, ids), expected)
    assert len(graphs) == 1


def test_a_distillation_compiles_the_teacher_with_the_student(tmp_path, monkeypatch):
    compiled, shapes, compile = [], [], LiveTeacher.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(type(model)) or model)
    monkeypatch.setattr(LiveTeacher, "compile", lambda *args: shapes.append(args[1:]) or compile(*args))
    write_random_model(tmp_path / "llama", TEACHERS["llama"], std=0.1, norm_mean=1.0)
    SubNet(TEACHERS["llama"], n_embd=24).save(tmp_path / "llama.yaml")
    for name, compiles in (("plain", False), ("compiled", True)):
        distill.setup(out_dir=tmp_path / name, **distilled(tmp_path, "llama") | {"compile": compiles})
    assert compiled == [LossModel, GPT] and shapes == [(4, SEQ)]
    same_losses(tmp_path / "plain", tmp_path / "compiled")
