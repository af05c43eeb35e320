"""Measure how many evaluations a surrogate saves: the same search without one, with a filter, and on predictions.

Searches sub-networks of a third of the teacher's size by evolution, several seeds each, and counts the evaluations to
reach the best perplexity of the search without a surrogate. A filter can also be fitted beforehand to the search of
another seed. Interrupted searches resume.

    python benchmarks/surrogate.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet \\
        --modes none filter transfer objective
"""

import argparse
from pathlib import Path

import numpy as np
from students import Data, search

from litgpt_whittle.evaluations import prediction_tau
from litgpt_whittle.journal import Evaluation

OUT = Path("out/surrogate")
NAMES = {
    "none": "no surrogate",
    "filter": "filter",
    "transfer": "filter that knows another search",
    "objective": "search on predictions",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=150, help="evaluations of each search")
    parser.add_argument("--batches", type=int, default=2, help="validation batches of 4 samples per candidate")
    parser.add_argument("--space", default="coarse_layerwise")
    parser.add_argument("--strategy", default="Evolution")
    parser.add_argument("--modes", nargs="+", default=["none", "filter"], choices=NAMES)
    args = parser.parse_args()
    data = Data(args)
    # in this order, because a filter may be fitted to an earlier search
    modes = [mode for mode in NAMES if mode in args.modes or mode == "none"]
    found = {mode: [run(data, args, mode, seed) for seed in range(1, args.seeds + 1)] for mode in modes}
    show(found)
    plot(found)


def run(data: Data, args: argparse.Namespace, mode: str, seed: int) -> list[Evaluation]:
    """Run one search."""
    flags = [
        f"--space={args.space}",
        f"--strategy={args.strategy}",
        f"--seed={seed}",
        f"--eval.max_iters={args.batches}",
    ]
    if mode != "none":
        flags.append(f"--surrogate.mode={'objective' if mode == 'objective' else 'filter'}")
    if mode == "transfer":
        flags.append(f"--surrogate.path={OUT / args.space / f'none-{seed % args.seeds + 1}'}")
    return search(data, OUT / args.space / f"{mode}-{seed}", args.iterations, *flags)


def best_so_far(evaluations: list[Evaluation]) -> np.ndarray:
    """Return the best perplexity after each evaluation."""
    return np.minimum.accumulate([e.score("perplexity") for e in evaluations])


def reaches(curve: np.ndarray, target: float) -> float:
    """Return the evaluations until a curve is at or below a target; infinite if it never is."""
    there = np.flatnonzero(curve <= target)
    return float(there[0]) + 1 if len(there) else np.inf


def show(found: dict[str, list[list[Evaluation]]]) -> None:
    """Print the evaluations to reach the best of the search without a surrogate and with the same seed."""
    plain = [best_so_far(evaluations) for evaluations in found["none"]]
    print(f"{'':34}{'best perplexity':>24}{'evaluations to the best without one':>40}{'tau':>20}")
    for mode, searches in found.items():
        curves = [best_so_far(evaluations) for evaluations in searches]
        needed = [reaches(curve, target[-1]) for curve, target in zip(curves, plain)]
        taus = [prediction_tau(evaluations)[0] for evaluations in searches]
        columns = [" ".join(f"{curve[-1]:.1f}" for curve in curves), " ".join(f"{n:.0f}" for n in needed)]
        columns.append(" ".join(f"{tau:.2f}" for tau in taus) if mode != "none" else "")
        print(f"{NAMES[mode]:34}{columns[0]:>24}{columns[1]:>40}{columns[2]:>20}")
    median = {mode: np.median([best_so_far(own) for own in searches], axis=0) for mode, searches in found.items()}
    target = median["none"][-1]
    before = reaches(median["none"], target)
    for mode, curve in median.items():
        n = reaches(curve, target)
        print(
            f"median to perplexity {target:.1f}, {NAMES[mode]}: {n:.0f} evaluations, {n / before:.2f} of those without"
        )


def plot(found: dict[str, list[list[Evaluation]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (mode, searches) in enumerate(found.items()):
        curves = np.array([best_so_far(evaluations) for evaluations in searches])
        at = np.arange(1, curves.shape[1] + 1)
        axes.plot(at, curves.T, color=f"C{i}", alpha=0.3, linewidth=1)
        axes.plot(at, np.median(curves, axis=0), color=f"C{i}", linewidth=2.5, label=NAMES[mode])
    axes.set(xlabel="evaluations", ylabel="best perplexity so far", yscale="log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter("{x:.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    axes.set_title(f"Median (thin: each) of {len(next(iter(found.values())))} seeds", loc="left")
    figure.savefig(OUT / "surrogate.png", dpi=120)
    print(f"Picture: {OUT / 'surrogate.png'}")


if __name__ == "__main__":
    main()
