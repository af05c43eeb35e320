"""Test the installed package: recipes by name, types, and a README that works outside the repository."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

from litgpt_whittle.recipes import find_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "config_hub").rglob("*.yaml"))
RECIPE = "config_hub/search/pythia-6.9b/410m.yaml"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Build the wheel and the source distribution of the files that git would clone."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    skipped = {".git", "out", "build", "dist", "site", "__pycache__"}
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".venv")]
        folders[:] = [name for name in folders if not name.endswith(("_cache", ".egg-info"))]
        (source / Path(folder).relative_to(ROOT)).mkdir(exist_ok=True)
        for name in files:
            (source / Path(folder).relative_to(ROOT) / name).write_bytes((Path(folder) / name).read_bytes())
    program = (
        "from setuptools import build_meta as b; import sys; out = sys.argv[1];"
        "print(b.build_sdist(out)); print(b.build_wheel(out))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Deprecat" not in done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def test_the_wheel_has_recipes_and_types(built):
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    assert {f"litgpt_whittle/{recipe.as_posix()}" for recipe in RECIPES} | {"litgpt_whittle/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"litgpt_whittle"}


def test_the_source_distribution_has_all_that_the_tests_and_the_readme_need(built):
    names = {name.partition("/")[2] for name in tarfile.open(built["sdist"]).getnames()}
    needed = {"Makefile", "setup.py", "constraints.txt", "constraints-lowest.txt", "tests/checkpoints.py", "LICENSE"}
    needed |= {"CONTRIBUTING.md", "mkdocs.yml"}
    for folder in ("tests", "tutorials", "docs", "benchmarks", "config_hub", "litgpt_whittle"):
        files = (path for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".md", ".yaml", ".png"))
        needed |= {path.relative_to(ROOT).as_posix() for path in files if "build" not in path.parts}
    assert needed - names == set()


def test_metadata_of_the_wheel_holds_outside_the_repository(built):
    wheel = zipfile.ZipFile(built["wheel"])
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(path))
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert not any("License ::" in line for line in metadata.get_all("Classifier"))
    readme = metadata.get_payload(decode=True).decode()
    assert "litgpt search" in readme and "`tutorials/search.md`" in readme
    assert re.findall(r"\]\((?!https?://)[^)]*\)", readme) == []


def test_an_installed_package_finds_its_recipes_by_name(built, tmp_path):
    """With the wheel installed by pip, in a working directory without recipes."""
    installed = tmp_path / "installed"
    zipfile.ZipFile(built["wheel"]).extractall(installed)
    command = [sys.executable, "-m", "litgpt", "search", "T", f"--config={RECIPE}", "--print_config"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"out_dir: {yaml.safe_load((ROOT / RECIPE).read_text())['out_dir']}\n" in done.stdout


def test_a_file_of_the_working_directory_comes_before_the_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(RECIPE) == ROOT / RECIPE  # of an editable install
    (tmp_path / RECIPE).parent.mkdir(parents=True)
    (tmp_path / RECIPE).touch()
    assert find_recipe(RECIPE) == RECIPE


@pytest.mark.parametrize("path", ["a.yaml", "config_hub/none.yaml", "config_hub/../setup.py", "/config_hub/search"])
def test_other_paths_stay_as_they_are(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(path) == path


def test_the_lowest_lane_pins_the_bounds_of_the_package():
    """Except for torch, whose lowest builds need CUDA, psutil, which litgpt pins, and tools that no test needs."""
    bounds = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE))
    higher = {name for name in bounds if not f"{pins.get(name)}.".startswith(f"{bounds[name]}.")}
    assert higher == {"torch", "psutil", "ruff", "import-linter", "mypy", "pre-commit"} and pins.keys() <= bounds.keys()
