"""The benchmarks import what there is; they take too long to be run here."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_name_that_a_benchmark_imports_exists(script):
    beside = {path.stem: path for path in SCRIPTS if path.parent == FOLDER}
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
