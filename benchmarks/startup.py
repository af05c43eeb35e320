"""What the extension costs those who don't use it: `import torch` and `litgpt --help`, with and without it.

    python benchmarks/startup.py

`TORCH_DEVICE_BACKEND_AUTOLOAD=0` is "without": PyTorch then calls no extension. Runs are interleaved.
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
    seconds(command, "1"), seconds(command, "0")  # fill the file cache
    with_it, without = zip(*[(seconds(command, "1"), seconds(command, "0")) for _ in range(runs)])
    ours, theirs = statistics.median(with_it), statistics.median(without)
    paired = statistics.median(a - b for a, b in zip(with_it, without))
    print(f"{name}: {ours:.3f} s with, {theirs:.3f} s without; {paired * 1000:+.1f} ms, ratio {ours / theirs:.3f}")


if __name__ == "__main__":
    in_process = (
        "import time, torch; from torch import _import_device_backends as load;"
        "t = time.perf_counter(); load(); print(time.perf_counter() - t)"
    )
    once = [
        float(subprocess.run([sys.executable, "-c", in_process], capture_output=True, text=True, check=True,
                             env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}).stdout)
        for _ in range(10)
    ]  # fmt: skip
    print(f"the extension's own part of import torch: {statistics.median(once) * 1000:.2f} ms (limit 5)")
    compare("import torch", [sys.executable, "-c", "import torch"], runs=10)
    compare("litgpt --help", [str(Path(sys.executable).with_name("litgpt")), "--help"], runs=5)
