"""Measure the speed-up of a search by two processes over one, with one thread each.

Runs a short and a long search with one and with two processes, interleaved, and compares the time of the additional
candidates, which excludes start-up. Both journals must hold the same candidates and scores.

    python benchmarks/search_devices.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet
"""

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

from students import Data, search

GOAL = 1.8
OUT = Path("out/search_devices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--iterations", type=int, nargs=2, default=[10, 60], help="evaluations: short, long search")
    parser.add_argument("--batches", type=int, default=8, help="validation batches of 4 samples per candidate")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    data = Data(args)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.repeats):
        journals = {}
        for devices, times in seconds.items():
            short, long = (run(data, args.batches, n, devices) for n in args.iterations)
            times.append(long[0] - short[0])
            journals[devices] = long[1]
        if journals[1] != journals[2]:
            sys.exit("error: two processes did not find what one finds")
    n = args.iterations[1] - args.iterations[0]
    one, two = (statistics.median(times) for times in seconds.values())
    print(
        f"{n} candidates, median of {args.repeats}: one process {one:.1f} s, two processes {two:.1f} s: "
        f"{one / two:.2f} × (goal {GOAL})"
    )


def run(data: Data, batches: int, iterations: int, devices: int) -> tuple[float, list[tuple]]:
    """Return a search's seconds, start included, and its candidates with their scores."""
    folder = OUT / f"{devices}-{iterations}"
    shutil.rmtree(folder, ignore_errors=True)
    flags = [f"--devices={devices}", f"--eval.max_iters={batches}", "--strategy=RandomSearch"]
    started = time.perf_counter()
    evaluations = search(data, folder, iterations, *flags)
    return time.perf_counter() - started, [(e.subnet, round(e.score("nll"), 5)) for e in evaluations]


if __name__ == "__main__":
    main()
