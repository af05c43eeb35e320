"""Measure how much time a search with racing and a surrogate needs to match 300 evaluations of random search.

Both score candidates of the same bin on the same data; random search evaluates each on all of it. Reported are the time
and the tokens of candidates until one is as good. Interrupted searches resume.

    python benchmarks/random_search.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet
"""

import argparse
import math
import statistics
from itertools import accumulate
from pathlib import Path

from students import Data, search

from litgpt_whittle.evaluations import best_of
from litgpt_whittle.journal import Evaluation

OUT = Path("out/random_search")
GOAL = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--random", type=int, default=300, help="evaluations of the random search")
    parser.add_argument("--iterations", type=int, default=150, help="maximum evaluations of the other search")
    parser.add_argument("--batches", type=int, default=8, help="validation batches of 4 samples")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--strategy", default="Evolution")
    parser.add_argument("--surrogate", default="filter", choices=("filter", "none"))
    args = parser.parse_args()
    data = Data(args)
    ratios: dict[str, list[float]] = {"seconds": [], "tokens": []}
    for seed in args.seeds:
        same = [f"--seed={seed}", f"--eval.max_iters={args.batches}"]
        rival = search(data, OUT / f"random-{seed}", args.random, "--strategy=RandomSearch", *same)
        flags = [f"--strategy={args.strategy}", "--racing=true", f"--surrogate.mode={args.surrogate}", *same]
        ours = search(data, OUT / f"{args.strategy}-{args.surrogate}-{seed}", args.iterations, *flags)
        (best,) = best_of(rival).values()
        target = best.score("perplexity")
        n = reaches(ours, target)
        for what, values in ratios.items():
            spent = list(accumulate(getattr(evaluation, what) for evaluation in ours))
            values.append(spent[n - 1] / sum(getattr(evaluation, what) for evaluation in rival) if n else math.inf)
        at = f"after {n} candidates" if n else f"never in {len(ours)}"
        print(
            f"seed {seed}: random search finds {target:.1f} in {len(rival)} evaluations, {args.strategy} "
            f"{at}: {ratios['seconds'][-1]:.3f} of the time, {ratios['tokens'][-1]:.3f} of the tokens",
            flush=True,
        )
    medians = {what: statistics.median(values) for what, values in ratios.items()}
    print(f"median: {medians['seconds']:.3f} of the time (goal {GOAL}), {medians['tokens']:.3f} of the tokens")


def reaches(evaluations: list[Evaluation], perplexity: float) -> int | None:
    """Return the number of candidates until a fully evaluated one has at most this score."""
    for n, evaluation in enumerate(evaluations, 1):
        if not evaluation.dropped and evaluation.score("perplexity") <= perplexity:
            return n
    return None


if __name__ == "__main__":
    main()
