"""Compare searches that keep the teacher's first units with searches that keep its most important units.

Searches all four spaces with the same number of evaluations on the same data, several seeds each, and compares the best
perplexities. Interrupted searches resume.

    python benchmarks/orders.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet
"""

import argparse
import math
from pathlib import Path
from typing import get_args

from students import Data, litgpt, search

from litgpt_whittle.evaluations import best_of
from litgpt_whittle.spaces.space import SpaceName

OUT = Path("out/orders")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=100, help="evaluations of each search")
    parser.add_argument("--batches", type=int, default=4, help="validation batches of 4 samples per candidate")
    parser.add_argument("--strategy", default="Evolution")
    args = parser.parse_args()
    data = Data(args)
    ranking = OUT / "importance.pt"
    if not ranking.is_file():
        litgpt("rank", data.teacher, f"--out_dir={OUT}", *data.flags(batch=16))
    print(f"{'space':20}{'first':>24}{'most important':>24}{'ratio':>8}   the best perplexity of each seed")
    for space in get_args(SpaceName):
        found: dict[str, list[float]] = {"given": [], "importance": []}
        for seed in range(1, args.seeds + 1):
            for order, bests in found.items():
                flags = [f"--space={space}", f"--seed={seed}", f"--strategy={args.strategy}"]
                flags += [f"--eval.max_iters={args.batches}", f"--order={order}"]
                if order == "importance":
                    flags.append(f"--importance={ranking}")
                if order == "importance" and space.startswith("fine"):
                    flags.append("--search_space.layers=best")  # units are free here, so an order can only rank layers
                (best,) = best_of(search(data, OUT / f"{space}-{order}-{seed}", args.iterations, *flags)).values()
                bests.append(best.score("perplexity"))
        first, important = found.values()
        ratio = math.prod(b / a for a, b in zip(first, important)) ** (1 / len(first))
        columns = [", ".join(f"{value:.1f}" for value in values) for values in (first, important)]
        print(f"{space:20}{columns[0]:>24}{columns[1]:>24}{ratio:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
