"""Measure the overhead of the installed extension for `import torch` and `litgpt --help`.

    python benchmarks/startup.py

With `TORCH_DEVICE_BACKEND_AUTOLOAD=0`, PyTorch calls no extension, which is the baseline. Runs are interleaved.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def seconds(command: list[str], autoload: str) -> float:
    started = time.perf_counter()
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def compare(name: str, command: list[str], runs: int) -> None:
    seconds(command, "1"), seconds(command, "0")  # warm up the file cache
    with_it, without = zip(*[(seconds(command, "1"), seconds(command, "0")) for _ in range(runs)])
    ours, theirs = statistics.median(with_it), statistics.median(without)
    paired = statistics.median(a - b for a, b in zip(with_it, without))
    print(f"{name}: {ours:.3f} s with, {theirs:.3f} s without; {paired * 1000:+.1f} ms, ratio {ours / theirs:.3f}")


LOAD = """
import importlib.metadata as metadata, sys, time, torch
if sys.argv[1] == "without":
    every = metadata.entry_points
    metadata.entry_points = lambda **kwargs: [e for e in every(**kwargs) if e.name != "litgpt_whittle"]
start = time.perf_counter()
torch._import_device_backends()
print(time.perf_counter() - start)
"""


def load_seconds(which: str) -> float:
    """Return the seconds in which `import torch` finds and loads extensions, with ours or without."""
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", LOAD, which]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    pairs = [(load_seconds("with"), load_seconds("without")) for _ in range(10)]
    ours, theirs = (statistics.median(seconds) * 1000 for seconds in zip(*pairs))
    print(f"our share of import torch: {ours - theirs:.2f} ms (limit 5), plus {theirs:.2f} ms for torch's own lookup")
    compare("import torch", [sys.executable, "-c", "import torch"], runs=10)
    compare("litgpt --help", [str(Path(sys.executable).with_name("litgpt")), "--help"], runs=5)
