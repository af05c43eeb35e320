"""Test that a shell parses proposed command lines as intended."""

import shlex
from pathlib import Path

import pytest
from test_cache_teacher import cache
from test_train import checkpoint, config

from litgpt_whittle.commands import extract, prune
from litgpt_whittle.hints import try_next
from litgpt_whittle.subnet import SubNet


def proposed(printed: str) -> list[str]:
    """Return the proposed command's arguments, as a POSIX shell splits them."""
    (line,) = [line for line in printed.splitlines() if "Try: " in line]
    return shlex.split(line.partition("Try: ")[2])


@pytest.mark.parametrize("name", ["plain", "my teacher", "it's", "a;b", "$HOME", "größe"])
def test_paths_stay_one_argument(name):
    path = Path("out dir") / name
    assert proposed(try_next("extract", path, "--tokens", 5)) == ["litgpt", "extract", str(path), "--tokens", "5"]


def test_commands_propose_their_own_folders(tmp_path, capsys):
    teacher, folder = checkpoint(tmp_path / "my teacher"), tmp_path / "my students"
    SubNet(config(), n_embd=16).save(tmp_path / "student.yaml")
    extract.setup(teacher, tmp_path / "student.yaml", folder / "cut")
    assert proposed(capsys.readouterr().out) == ["litgpt", "generate", str(folder / "cut")]
    prune.setup(teacher, folder / "pruned", method="magnitude")
    assert proposed(capsys.readouterr().out) == ["litgpt", "generate", str(folder / "pruned")]
    cache(teacher, folder / "cache", codec="top_k")
    expected = ["litgpt", "distill", "--teacher_cache", str(folder / "cache"), "--distill.temperature", "0.9"]
    assert proposed(capsys.readouterr().out) == expected
