"""Compare all search strategies in the same bin: best score, and evaluations until it is reached.

Every strategy searches with the same seeds and is scored on the same tokens; the table compares with a random search,
which may use more evaluations. Measurements that a strategy makes before its search count as evaluations. Scores are
kept: an interrupted run resumes, and a run with more evaluations or seeds reuses them.

    python benchmarks/strategies.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet
"""

import argparse
import json
import math
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from students import Data

from litgpt_whittle import SubNet, load_model, n_params, registry
from litgpt_whittle.batches import calibration_windows, connect, fingerprint, validation_batches
from litgpt_whittle.checkpoint import weights_fingerprint
from litgpt_whittle.figures.style import COLORS
from litgpt_whittle.fitness import Fitness
from litgpt_whittle.metrics import MEASURES, MeasureArgs
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.strategies import Scored, Strategy

OUT = Path("out/strategies")
GROUP = "litgpt_whittle.strategies"
RIVAL = "RandomSearch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--n", type=int, default=100, help="evaluations of each search")
    parser.add_argument("--random_n", type=int, default=300, help="evaluations of the random search to compare with")
    parser.add_argument("--seeds", type=int, default=3, help="searches by each strategy")
    parser.add_argument("--strategies", default=",".join(registry.names(GROUP)), help="names, separated by commas")
    parser.add_argument("--space", default="coarse_layerwise")
    parser.add_argument("--bin", help="by default a third of the teacher's parameters ±5%%")
    parser.add_argument("--batches", type=int, default=2, help="validation batches of 16 sequences per candidate")
    parser.add_argument("--fitness", default="perplexity")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, names = Data(args), args.strategies.split(",")
    third = n_params(data.config, SubNet.full(data.config)) // 3
    space = Space(data.config, args.space, Bin.parse(args.bin or f"{third}±5%"))
    fitness = load_fitness(data, args.fitness, args.batches)
    origin = weights_fingerprint(data.teacher)[:6] + fingerprint(fitness.batches)[:6]
    folder = OUT / f"{args.space}-{space.bin}-{args.fitness}-{origin}"
    print(f"{args.space}, bin {space.bin}, {fitness.n_tokens:,} tokens per candidate; scores are kept in {folder}")
    scores = {name: [] for name in dict.fromkeys([RIVAL, *names])}
    for seed in range(args.seeds):
        for name in scores:
            n = args.random_n if name == RIVAL else args.n
            scores[name].append(search(name, seed, n, space, fitness, folder / f"{name}-{seed}.json"))
    report(scores, fitness.name)
    plot(scores, fitness.name, folder / "strategies.png")


def load_fitness(data: Data, name: str, n_batches: int) -> Fitness:
    """Return the fitness of the candidates, with the teacher and the data loaded."""
    measure, module, length = registry.lookup("litgpt_whittle.fitness", name), data.module(), data.config.block_size
    connect(module, data.teacher, 16, length)
    model = load_model(data.teacher, "SuperGPT")
    model.max_seq_length = length
    n = measure.n_calibration
    wanted = {"calibration": calibration_windows(module, length, n).input_ids} if n else {}
    return measure(model, validation_batches(module, length, n_batches), **wanted)


def search(name: str, seed: int, n: int, space: Space, fitness: Fitness, path: Path) -> list[float]:
    """Return the scores of n candidates; known scores come from a file."""
    known = json.loads(path.read_text()) if path.is_file() else []
    strategy = registry.lookup(GROUP, name)()
    strategy.start(space, seed)
    # measurements count as evaluations but can never be the best
    scores = [math.inf] * measure(strategy, fitness, path.with_name(f"{name}-measured.json"))
    while len(scores) < n and (candidates := strategy.ask(1)):
        (candidate,) = candidates
        scores.append(known[len(scores)] if len(scores) < len(known) else fitness(candidate)[fitness.name])
        costs = [cost for cost in strategy.objectives if cost in MEASURES]
        args = MeasureArgs(tied=space.tied)
        measures = {cost: MEASURES[cost](space.teacher, candidate, args) for cost in costs}
        measures |= {"nll": math.log(scores[-1])} if fitness.name.endswith("perplexity") else {}
        strategy.tell(candidate, scores[-1], measures)
        if len(scores) > len(known):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(scores))
    print(f"seed {seed}, {name}: {min(scores):.2f} after {len(scores)} evaluations", flush=True)
    return scores


def measure(strategy: Strategy, fitness: Fitness, path: Path) -> int:
    """Make a strategy's measurements, or read them from a file; return their number."""
    subnets = strategy.measurements() if strategy.needs_measurements else {}
    known = json.loads(path.read_text()) if path.is_file() else {}
    for subnet_name in subnets.keys() - known.keys():
        known[subnet_name] = fitness(subnets[subnet_name])
    if subnets:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))
        measured = {key: Scored(subnets[key], known[key][fitness.name], known[key]) for key in subnets}
        strategy.take_measurements(measured)
    return len(subnets)


def report(scores: dict[str, list[list[float]]], measure: str) -> None:
    """Print each strategy's results against the random search with the same seed."""
    goals = [min(one) for one in scores[RIVAL]]
    head = f"best {measure}"
    print(f"\n{'strategy':22}{head:>22}{'worst seed':>12}{'against random':>16}{'evaluations to beat it':>26}")
    for name, runs in sorted(scores.items(), key=lambda item: fmean(map(min, item[1]))):
        bests = [min(one) for one in runs]
        ratio = math.prod(best / goal for best, goal in zip(bests, goals)) ** (1 / len(goals))
        beaten = [next((i for i, s in enumerate(one, 1) if s < goal), None) for one, goal in zip(runs, goals)]
        counts = [str(count or "never") for count in beaten]
        n = f"{name} ({len(runs[0])})"
        print(f"{n:22}{fmean(bests):>22.2f}{max(bests):>12.2f}{ratio:>15.3f}x{', '.join(counts):>26}")


def plot(scores: dict[str, list[list[float]]], measure: str, path: Path) -> None:
    """Plot the best score so far: mean and range over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    colors = ("#888888", *COLORS, "#222222")
    for i, (name, runs) in enumerate(scores.items()):
        length = min(map(len, runs))
        bests = np.minimum.accumulate([one[:length] for one in runs], axis=1)
        steps, color = np.arange(1, length + 1), colors[i % len(colors)]
        axes.step(steps, bests.mean(0), where="post", color=color, label=f"{name}: {bests[:, -1].mean():.1f}")
        axes.fill_between(steps, bests.min(0), bests.max(0), step="post", color=color, alpha=0.1, linewidth=0)
    axes.set(xlabel="evaluations", ylabel=f"best {measure} so far", yscale="log")
    # the first random candidates would fill most of the picture
    first = [min(one[:10]) for runs in scores.values() for one in runs]
    axes.set_ylim(top=1.1 * max(filter(math.isfinite, first)))
    for kind in ("major", "minor"):
        getattr(axes.yaxis, f"set_{kind}_formatter")("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(f"The best so far, mean and range over seeds: {len(runs)}", loc="left")
    figure.savefig(path, dpi=120)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
