"""Test the benchmarks: their imports exist, and the GPU benchmark runs in full at toy sizes."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_name_that_a_benchmark_imports_exists(script):
    beside = {path.stem: path for folder in (FOLDER, script.parent) for path in SCRIPTS if path.parent == folder}
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "litgpt_whittle":
            module = import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or find_spec(f"{node.module}.{name.name}"), (
                    f"{script.name}: {name.name}"
                )
        elif isinstance(node, ast.ImportFrom) and node.module in beside:
            defined = ast.parse(beside[node.module].read_text()).body
            names = {n.name for n in defined if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            names |= {t.id for n in defined if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
            assert {name.name for name in node.names} <= names


STEPS = {
    "card": {"bf16_tflops", "copy_tb_per_s"},
    "values": {"whole_logits", "repair_errors", "supernet_losses"},
    "search": {"ratio", "tokens_per_s", "extracted_tokens_per_s"},
    "repair_250k": {"seconds", "tokens_per_s"},
    "distill_eager": {"step_s", "tokens_per_s", "peak_gb", "planned_gb", "busy"},
    "head": {"v50k_ours_ce_kl_ms", "v50k_plain_ce_kl_ms"},
}
"""Some steps of the GPU benchmark, and some of their figures"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_step_of_the_gpu_benchmark_leaves_its_figures(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu/run.py"), "--tiny", "--out", str(tmp_path), "--only", *STEPS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == STEPS.keys()
    for row in rows:
        assert "error" not in row and row["figures"].keys() >= STEPS[row["step"]], row
        assert row["step"] in done.stdout.partition("figure")[2]  # the table
    assert "missed" not in done.stdout  # the values are computed by the CPU itself
