"""Against the rivals, on one machine, in one run: whittle, Minitron's procedure, and plain `litgpt pretrain`.

    python benchmarks/rivals.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet \
        --whittle_python WHITTLE_ENVIRONMENT/bin/python

Runs the scripts that compare with them one after the other, and keeps what they print, part by part:

extraction    what is cut out against what was scored, and how parameters are counted: whittle
search        candidates scored per CPU second: whittle
distillation  tokens per CPU second and memory: whittle, plain `litgpt pretrain`
pruning       perplexity at 2:4: whittle
students      perplexity before and after equally many tokens of training: the plain cut, as whittle makes it; random
              weights, as `litgpt pretrain` has them; the most important units in the best of a few sizes (Minitron)

whittle has an environment of its own, since it asks for another litgpt: `pip install whittle==0.6.0` there.
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
    parser.add_argument("--whittle_python", type=Path, required=True, help="the Python that has whittle")
    parser.add_argument("--parts", nargs="*", help="only these")
    parser.add_argument("--report", type=Path, default=Path("out/rivals"), help="where what is printed is kept")
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
    # the scripts end so where one of their goals is missed
    missed = [part for part, code in codes.items() if code]
    if missed:
        sys.exit(f"goals missed, or failed: {', '.join(missed)}")


def run(command: list[str], path: Path) -> int:
    """Runs a script, shows what it prints, and keeps it; gives the exit code."""
    print(f"\n== {path.stem}: {' '.join(command)}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"} | os.environ
    started = [sys.executable, str(HERE / command[0]), *command[1:]]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True, env=environment) as process:
        lines = [line for line in process.stdout if not print(line, end="", flush=True)]
    path.write_text("".join(lines))
    return process.returncode


if __name__ == "__main__":
    main()
