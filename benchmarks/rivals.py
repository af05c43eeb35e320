"""Compare with whittle, Minitron's procedure and plain `litgpt pretrain`, on one machine in one run.

    python benchmarks/rivals.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet \
        --whittle_python WHITTLE_ENVIRONMENT/bin/python

Runs the scripts that compare with each of them in turn, and keeps their output by part:

extraction    extracted models against scored sub-networks, and the parameter count: whittle
search        candidates scored per CPU second: whittle
distillation  tokens per CPU second and memory: whittle, plain `litgpt pretrain`
pruning       perplexity at 2:4: whittle
students      perplexity before and after the same number of training tokens: plain cut, as whittle makes it; random
              weights, as in `litgpt pretrain`; the most important units in the best of a few sizes (Minitron)

whittle needs its own environment because it requires another litgpt version: `pip install whittle==0.6.0`.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from students import Data

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Data.add_arguments(parser)
    parser.add_argument("--whittle_python", type=Path, required=True, help="Python of an environment with whittle")
    parser.add_argument("--parts", nargs="*", help="parts to run; all by default")
    parser.add_argument("--report", type=Path, default=Path("out/rivals"), help="folder for the output of each part")
    args = parser.parse_args()
    text = [f"--teacher={args.teacher}", f"--train={args.train}", f"--validation={args.validation}"]
    rival = [f"--whittle_python={args.whittle_python}"]
    parts = {
        "extraction": ["extraction.py", "--n=10", *rival],
        "search": ["search_throughput.py", *rival],
        "distillation": ["distill_throughput.py", "--steps=6", "--repeats=3", *rival],
        "pruning": ["prune.py", "--tokens=32768", "--batches=16", "--refit", *text, *rival],
        "students": ["evidence.py", "--questions", "starts", "strategies", "--tokens=81920", *text],
    }
    for unknown in set(args.parts or ()) - set(parts):
        parser.error(f"there is no part {unknown!r}; choose from {', '.join(parts)}")
    args.report.mkdir(parents=True, exist_ok=True)
    codes = {part: run(parts[part], args.report / f"{part}.txt") for part in args.parts or parts}
    # the scripts exit with a nonzero code if a goal is missed
    missed = [part for part, code in codes.items() if code]
    if missed:
        sys.exit(f"goals missed, or failed: {', '.join(missed)}")


def run(command: list[str], path: Path) -> int:
    """Run a script, print and keep its output, and return its exit code."""
    print(f"\n== {path.stem}: {' '.join(command)}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"} | os.environ
    started = [sys.executable, str(HERE / command[0]), *command[1:]]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True, env=environment) as process:
        lines = [line for line in process.stdout if not print(line, end="", flush=True)]
    path.write_text("".join(lines))
    return process.returncode


if __name__ == "__main__":
    main()
