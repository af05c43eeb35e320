"""What predicts a student's place after training: its perplexity as cut, or after a repair from moments?

Draws sub-networks of one bin, repairs each (`litgpt extract --repair`), trains each on a million tokens, and compares
by Kendall's τ the rankings before training (as cut, repaired from the teacher's moments, repaired) and on the way
(training losses: all students see the same batches in the same order) with the one after it. Finished students are
kept, so that an interrupted run goes on.

    python benchmarks/rankings.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from students import Data, litgpt, train_settings

from litgpt_whittle import SubNet, load_model, n_params
from litgpt_whittle.batches import calibration_windows, connect, validation_batches
from litgpt_whittle.results import TrainingResult
from litgpt_whittle.spaces.bins import parse_bins
from litgpt_whittle.spaces.space import Space

OUT = Path("out/rankings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--n", type=int, default=40, help="sub-networks")
    parser.add_argument("--size", type=float, default=1 / 8, help="theirs, as a share of the teacher's")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens of each")
    parser.add_argument("--share", default="1/2", help="this process trains every second student, from the first one")
    parser.add_argument("--only", choices=("train", "score"), help="do only this part")
    args = parser.parse_args()
    data = Data(args)
    subnets = draw(data, args.n, args.size)
    first, step = map(int, args.share.split("/"))
    if args.only != "score":
        for i in list(range(args.n))[first - 1 :: step]:
            train(data, subnets[i], i, args.tokens)
    if args.only != "train":
        score(data, subnets)


def draw(data: Data, n: int, share: float) -> list[SubNet]:
    """Random sub-networks of one size, of the default space."""
    teacher = data.config
    (bin,) = parse_bins(f"{int(share * n_params(teacher, SubNet.full(teacher)))}±5%")
    space, rng = Space(teacher, "coarse_layerwise", bin), np.random.default_rng(0)
    return [space.sample(rng) for _ in range(n)]


def train(data: Data, subnet: SubNet, i: int, tokens: int) -> None:
    """Repairs and trains one student, if that is not done yet."""
    folder = OUT / f"{i:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "student/lit_model.pth").is_file():
        subnet.save(folder / "sub_network.yaml")
        flags = ["--repair.tokens=32768", *data.flags(batch=16)]
        litgpt("extract", data.teacher, folder / "sub_network.yaml", f"--out_dir={folder / 'student'}", *flags)
    if not (folder / "trained/final/lit_model.pth").is_file():
        settings = train_settings(folder / "train.yaml", data, tokens, lr=1e-3, every=10_000)
        start = f"--initial_checkpoint_dir={folder / 'student'}"
        litgpt("distill", f"--config={settings}", start, f"--out_dir={folder / 'trained'}")


def score(data: Data, subnets: list[SubNet]) -> None:
    """The rankings before training, and how they agree with the one after it."""
    from scipy.stats import kendalltau

    from litgpt_whittle.fitness.perplexity import Perplexity, RepairedPerplexity

    torch.set_num_threads(1)
    module = data.module()
    connect(module, data.teacher, 16, data.config.block_size)
    batches = validation_batches(module, data.config.block_size, 8)
    windows = calibration_windows(module, data.config.block_size, RepairedPerplexity.n_calibration)
    model = load_model(data.teacher, "SuperGPT")
    model.max_seq_length = data.config.block_size
    cut, repaired = Perplexity(model, batches), RepairedPerplexity(model, batches, calibration=windows)
    runs = {i: TrainingResult(OUT / f"{i:02d}/trained") for i in range(len(subnets))}
    runs = {i: run for i, run in runs.items() if (run.folder / "final/lit_model.pth").is_file()}
    columns = {
        "as cut": [cut(subnets[i])["nll"] for i in runs],
        "repaired from moments": [repaired(subnets[i])["nll"] for i in runs],
        "repaired": [run.curve[0][1] for run in runs.values()],
    }
    for tokens in sorted({row["tokens"] for run in runs.values() for row in run.rows if "loss" in row}):
        rows = [next(row for row in run.rows if "loss" in row and row["tokens"] == tokens) for run in runs.values()]
        columns[f"after {tokens:,} tokens"] = [row["loss"] for row in rows]
    columns["trained"] = [run.val_loss for run in runs.values()]
    (OUT / "losses.json").write_text(json.dumps(columns))
    print(f"{len(runs)} of {len(subnets)} sub-networks are trained")
    print(f"{'loss, nats per token':24}{'best':>8}{'worst':>8}{'tau with the trained ranking':>30}")
    for name, losses in columns.items():
        tau = kendalltau(losses, columns["trained"])
        shown = f"{tau.statistic:.2f} (p = {tau.pvalue:.2g})"
        print(f"{name:24}{min(losses):>8.3f}{max(losses):>8.3f}{shown:>30}")
    agreed = kendalltau(columns["as cut"], columns["repaired from moments"]).statistic
    print(f"tau of as cut with repaired from moments: {agreed:.2f}")
    plot(columns)


def plot(columns: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, name in zip(axes, ("as cut", "repaired from moments")):
        ax.scatter(columns[name], columns["trained"], s=18)
        ax.set(xlabel=f"NLL {name}, before training")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("NLL after training")
    figure.suptitle("Sub-networks of one bin: what predicts their place after training?")
    figure.savefig(OUT / "rankings.png", dpi=120)
    print(f"Picture: {OUT / 'rankings.png'}")


if __name__ == "__main__":
    main()
