"""Measure peak memory and time of `litgpt extract` against the student's size and the bytes that must be read.

Writes a checkpoint of Pythia-6.9B's shape (13.7 GB of made-up bfloat16), extracts a student of Pythia-410M's shape in a
separate process, and deletes both.

    python benchmarks/extract_memory.py              # needs 16 GB of disk
    python benchmarks/extract_memory.py --scale 0.25 # a sixteenth of the weights
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import incremental_save, save_config

from litgpt_whittle.index_plan import plan
from litgpt_whittle.subnet import SubNet

LIMIT = 1.5e9
"""Maximum memory above the student's size, in bytes"""

PAGE = os.sysconf("SC_PAGE_SIZE")

CHILD = """
import json, sys, time
start = time.perf_counter()
from litgpt_whittle.commands.extract import setup
imported = time.perf_counter()
setup(*sys.argv[1:4])
seconds = time.perf_counter() - imported
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
disk = dict(line.split(":", 1) for line in open("/proc/self/io"))
result = dict(seconds=seconds, import_seconds=imported - start, peak=int(lines["VmHWM"].split()[0]) * 1024,
              from_disk=int(disk["read_bytes"]))
print("RESULT", json.dumps(result))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all widths: 0.25, 0.5 or 1")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="folder for the temporary files")
    args = parser.parse_args()
    teacher, subnet = shapes(args.scale)
    n_bytes, student_bytes = size(teacher), size(subnet.config)
    if shutil.disk_usage(args.dir).free < n_bytes + 3 * student_bytes:
        sys.exit(f"error: {args.dir} needs {(n_bytes + 3 * student_bytes) / 1e9:.1f} GB free; choose another --dir")
    folder = Path(tempfile.mkdtemp(prefix="extract-memory-", dir=args.dir))
    try:
        figures = measure(folder, teacher, subnet, student_bytes)
    finally:
        shutil.rmtree(folder)
    report(figures)
    sys.exit(figures["peak"] > figures["limit"])


def shapes(scale: float) -> tuple[Config, SubNet]:
    """Return the config of Pythia-6.9B, and a sub-network of Pythia-410M's sizes."""

    def of(width: int) -> int:
        return int(width * scale)

    sizes = dict(n_embd=of(4096), n_head=of(32), head_size=128, padded_vocab_size=of(50432), vocab_size=of(50254))
    teacher = Config.from_name("pythia-6.9b", intermediate_size=of(16384), n_query_groups=of(32), **sizes)
    # drop every fourth layer, so that the kept ones are not just a prefix
    student = dict(n_embd=of(1024), n_layer=",".join(str(i) for i in range(32) if i % 4 != 3), head_size=64)
    return teacher, SubNet(teacher, n_query_groups=of(16), intermediate_size=of(4096), **student)


def size(config: Config) -> int:
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in GPT(config).state_dict().values()) * 2


def measure(folder: Path, teacher: Config, subnet: SubNet, student_bytes: int) -> dict[str, float]:
    path = folder / "teacher" / "lit_model.pth"
    write_teacher(teacher, path)
    subnet.save(folder / "student.yaml")
    needed = bytes_on_needed_pages(subnet)
    forget(path)
    command = [sys.executable, "-c", CHILD, str(path.parent), str(folder / "student.yaml"), str(folder / "student")]
    # bytecode and shared libraries are warm, because this process has just used them
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(output.partition("RESULT")[0])
    figures = json.loads(output.partition("RESULT")[2])
    figures |= {
        "teacher": path.stat().st_size,
        "student": student_bytes,
        "limit": student_bytes + LIMIT,
        "needed": needed,
    }
    student = folder / "student" / "lit_model.pth"
    figures["write_seconds"] = seconds_to_copy(student, folder / "copy")
    for name, n_bytes in (("needed", needed), ("teacher", path.stat().st_size)):
        forget(path)
        figures[f"{name}_seconds"] = seconds_to_read(path, n_bytes)
    return figures


def write_teacher(config: Config, path: Path) -> None:
    """Write made-up weights one tensor at a time, repeating a block of noise; disks do not detect the repetition."""
    path.parent.mkdir()
    save_config(config, path.parent)
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    weights = {}
    with incremental_save(path) as saver:
        for i, (name, shape) in enumerate(shapes.items()):
            repeats = -(-shape.numel() // noise.numel())
            # a different offset for each tensor, or the head would equal the embedding
            weight = noise.roll(i).repeat(repeats)[: shape.numel()].view(shape).clone()
            weights[name] = saver.store_early(weight)
        saver.save(weights)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def bytes_on_needed_pages(subnet: SubNet) -> int:
    """Return the bytes of the file's pages that hold the student's weights, counting each tensor's rows as one run."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(subnet.teacher).state_dict().items()}
    total = 0
    for take in plan(subnet.teacher, subnet).values():
        rows, columns = (*take.index, slice(0, 1))[:2]
        rows = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()
        row_bytes = 2 * int(np.prod(shapes[take.name][1:]))
        first_column, last_column = (
            (columns.start, columns.stop - 1) if isinstance(columns, slice) else (int(columns[0]), int(columns[-1]))
        )
        first = (rows * row_bytes + 2 * first_column) // PAGE
        last = (rows * row_bytes + 2 * last_column) // PAGE
        total += int((last - first + 1).sum() - (first[1:] == last[:-1]).sum())
    return total * PAGE


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(path: Path, n_bytes: int) -> float:
    buffer = bytearray(2**24)
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while n_bytes > 0:
            n_bytes -= file.readinto(buffer) or n_bytes
    return time.perf_counter() - start


def seconds_to_copy(path: Path, to: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(path, to)
    with open(to, "rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def report(figures: dict[str, float]) -> None:
    rows = [
        ("teacher's file", f"{figures['teacher'] / 1e9:.2f} GB", f"plain read took {figures['teacher_seconds']:.1f} s"),
        (
            "pages with kept weights",
            f"{figures['needed'] / 1e9:.2f} GB",
            f"plain read took {figures['needed_seconds']:.1f} s",
        ),
        ("student", f"{figures['student'] / 1e9:.2f} GB", f"plain write took {figures['write_seconds']:.1f} s"),
        ("extract read from disk", f"{figures['from_disk'] / 1e9:.2f} GB", f"took {figures['seconds']:.1f} s"),
        ("imports before it", "", f"took {figures['import_seconds']:.1f} s"),
        ("peak resident memory", f"{figures['peak'] / 1e9:.2f} GB", f"at most {figures['limit'] / 1e9:.2f} GB"),
    ]
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, PyTorch {torch.__version__}"
    )
    for name, amount, note in rows:
        print(f"{name:<30} {amount:>9}   {note}")


if __name__ == "__main__":
    main()
