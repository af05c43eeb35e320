"""Measure tokens and perplexity of a search with racing against the same search with full evaluations.

python benchmarks/racing.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet
"""

import argparse
import statistics
from pathlib import Path

from students import Data, search

from litgpt_whittle.evaluations import best_of
from litgpt_whittle.journal import Evaluation

OUT = Path("out/racing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batches", type=int, default=32, help="validation batches of 4 windows")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--strategies", nargs="*", default=["Evolution", "RandomSearch"])
    args = parser.parse_args()
    data = Data(args)
    for strategy in args.strategies:
        tokens, perplexities, pairs = [], [], []
        for seed in args.seeds:
            full = run(data, args, strategy, seed)
            race = run(data, args, strategy, seed, "--racing=true")
            pairs.append((full, race))
            tokens.append(sum(e.tokens for e in race) / tokens_to_reach(full, 1.005 * best(race)))
            perplexities.append(best(race) / best(full))
            n_dropped = sum(e.dropped for e in race)
            print(
                f"{strategy}, seed {seed}: full {best(full):.3f} on {sum(e.tokens for e in full):,} tokens, race "
                f"{best(race):.3f} on {sum(e.tokens for e in race):,} ({n_dropped} of {len(race)} dropped)",
                flush=True,
            )
        total = statistics.median(sum(e.tokens for e in race) / sum(e.tokens for e in full) for full, race in pairs)
        print(
            f"{strategy}: a race takes {total:.2f} of the tokens of as many full evaluations (goal 0.2) and ends at "
            f"{statistics.median(perplexities):.4f} of their perplexity (goal 1.005); full evaluations until they come "
            f"within 0.5 % of the race's best: the race takes {statistics.median(tokens):.2f} of their tokens"
        )
    plot(pairs, OUT / "racing.png", args.strategies[-1])


def run(data: Data, args: argparse.Namespace, strategy: str, seed: int, *flags: str) -> list[Evaluation]:
    """Run one search."""
    folder = OUT / f"{strategy}-{seed}-{args.iterations}-{args.batches}{'-race' if flags else ''}"
    flags = (f"--strategy={strategy}", f"--seed={seed}", f"--eval.max_iters={args.batches}", *flags)
    return search(data, folder, args.iterations, *flags)


def best(evaluations: list[Evaluation]) -> float:
    (found,) = best_of(evaluations).values()
    return found.score("perplexity")


def tokens_to_reach(evaluations: list[Evaluation], perplexity: float) -> int:
    """Return the tokens until a candidate has at most this loss, or all tokens if none has."""
    total = 0
    for evaluation in evaluations:
        total += evaluation.tokens
        if evaluation.score("perplexity") <= perplexity:
            break
    return total


def plot(pairs: list[tuple[list[Evaluation], list[Evaluation]]], path: Path, strategy: str) -> None:
    """Plot the best perplexity so far over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, pair in enumerate(pairs):
        for evaluations, color, label in zip(pair, ("tab:gray", "tab:blue"), ("full evaluations", "race")):
            tokens, bests, total, lowest = [], [], 0, float("inf")
            for evaluation in evaluations:
                total += evaluation.tokens
                if not evaluation.dropped:
                    lowest = min(lowest, evaluation.score("perplexity"))
                tokens.append(total)
                bests.append(lowest)
            axes.step(tokens, bests, where="post", color=color, label=None if i else label)
    axes.set(xscale="log", yscale="log", xlabel="tokens that candidates saw", ylabel="best perplexity so far")
    axes.set_title(f"{strategy}, {len(pairs)} seeds", loc="left")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
