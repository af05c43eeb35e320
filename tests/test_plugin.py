"""Test the plugin: its commands appear however litgpt is started, and nothing breaks if they cannot."""

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

BIN = Path(sys.executable).parent


def run(*command: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | environment | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)


def distribution(folder: Path, name: str, entry_points: str, **modules: str) -> Path:
    """Simulate another package with entry points, as installed by pip."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    return folder


@pytest.fixture
def strangers(tmp_path) -> Path:
    commands = "[litgpt.commands]\ngreet = stranger:greet\nlost = nowhere:setup\nhurt = breaks:setup\n"
    commands += "pretrain = stranger:greet\n"
    return distribution(
        tmp_path,
        "stranger",
        commands,
        stranger='def greet(name: str = "you"):\n    """Say hello."""\n    print(f"hello {name}")\n',
        breaks="import no_such_module\ndef setup():\n    pass\n",
    )


def test_litgpts_help_lists_ours_and_strangers_and_names_the_broken(strangers):
    done = forked.run("-m", "litgpt", "--help", environment={"PYTHONPATH": str(strangers)})
    assert done.returncode == 0, done.stderr
    for line in (
        "search",
        "report",
        "rank",
        "extract",
        "distill",
        "cache_teacher",
        "greet",
        "Say hello.",
        "Extract a sub-network from a checkpoint.",
    ):
        assert line in done.stdout
    assert "skipping the command 'lost'" in done.stderr and "nowhere" in done.stderr
    assert "skipping the command 'pretrain'" in done.stderr and "there is one already" in done.stderr


@pytest.mark.parametrize("start", ["litgpt", "litgpt-whittle", ["-m", "litgpt"], ["-m", "litgpt_whittle"]], ids=str)
def test_a_strangers_command_runs(strangers, start):
    flags = "greet", "--name", "Ada"
    if isinstance(start, str):
        done = run(str(BIN / start), *flags, path=strangers)
    else:
        done = forked.run(*start, *flags, environment={"PYTHONPATH": str(strangers)})
    assert done.returncode == 0, done.stderr
    assert "hello Ada" in done.stdout


def test_a_command_that_cannot_be_imported_is_named_when_asked_for(strangers):
    done = forked.run("-m", "litgpt", "hurt", environment={"PYTHONPATH": str(strangers)})
    assert done.returncode == 2
    assert "skipping the command 'hurt'" in done.stderr and "no_such_module" in done.stderr
    assert "Traceback" not in done.stderr


def test_extension_can_be_switched_off(tmp_path):
    program = (
        "import litgpt.__main__ as stock; assert 'extract' not in {*stock.PARSER_DATA, *stock.parser_commands()};"
        "from litgpt_whittle.__main__ import main; main()"
    )
    command = [sys.executable, "-c", program, "extract", str(tmp_path / "none"), "s.yaml"]
    done = run(*command, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: there is no checkpoint directory")
    assert "Traceback" not in done.stderr


def test_our_own_script_explains_a_mistake_in_one_line():
    done = forked.run("-m", "litgpt_whittle", "extract", "x", "y", "--dtype", "int")
    expected = "dtype must be one of float32, float16, bfloat16, got 'int'"
    assert done.returncode == 2 and done.stderr.count(expected) == 1 and "Union of no types" not in done.stderr


def test_on_windows_our_commands_refuse_and_others_do_not(strangers, monkeypatch):
    from litgpt_whittle.plugin import commands

    monkeypatch.syspath_prepend(str(strangers))
    monkeypatch.setattr(sys, "argv", ["litgpt", "greet"])
    with monkeypatch.context() as windows, pytest.warns(UserWarning, match="skipping"):
        windows.setattr(sys, "platform", "win32")
        assert "greet" in commands() and "extract" in commands()
    monkeypatch.setattr(sys, "argv", ["litgpt", "extract"])
    with monkeypatch.context() as windows:
        windows.setattr(sys, "platform", "win32")
        with pytest.raises(SystemExit, match="litgpt extract needs Linux or macOS"):
            commands()


def test_bootstrap_survives_anything_and_imports_next_to_nothing():
    program = (
        "import sys, litgpt_whittle, litgpt_whittle.plugin as p; p.install(); p.install();"
        "assert not {'torch', 'litgpt', 'numpy'} & set(sys.modules);"
        "assert sum(type(f).__module__ == p.__name__ for f in sys.meta_path) == 1;"
        "assert 'SubNet' in dir(litgpt_whittle)"
    )
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr


def test_public_names_are_all_there():
    import litgpt_whittle

    for name in litgpt_whittle.__all__:
        assert getattr(litgpt_whittle, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        litgpt_whittle.nothing


def test_registry_names_what_there_is(strangers, monkeypatch):
    from litgpt_whittle.errors import UserError
    from litgpt_whittle.registry import load_all, lookup, names

    monkeypatch.syspath_prepend(str(strangers))
    assert {"Evolution", "RandomSearch"} <= set(names("litgpt_whittle.strategies"))
    with pytest.raises(UserError, match="there is no 'nothing' in litgpt.models; choose from LayerwiseGPT, SuperGPT"):
        lookup("litgpt.models", "nothing")
    with pytest.raises(UserError, match="'hurt' .* cannot be imported"):
        lookup("litgpt.commands", "hurt")
    with pytest.warns(UserWarning, match="skipping 'hurt'"):
        assert "greet" in load_all("litgpt.commands")
