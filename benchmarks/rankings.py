"""Measure how well losses before training predict the ranking of students after training.

Draws sub-networks of one bin, repairs each (`litgpt extract --repair`) and trains each on a million tokens. Kendall's τ
compares the final ranking with the rankings before training (plain cut, repaired from moments, repaired) and
during it (training losses; all students see the same batches in the same order). Finished students are kept, so an
interrupted run resumes; students whose losses are in the report's CSV are only scored again, not trained.

    python benchmarks/rankings.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet

With --llama, a Llama-shaped teacher is first trained on the same text and replaces the given one.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from repair import train_llama
from scipy.stats import bootstrap, kendalltau
from students import Data, litgpt, train_settings

from litgpt_whittle import SubNet, load_model, n_params
from litgpt_whittle.batches import calibration_windows, connect, validation_batches
from litgpt_whittle.figures.style import (
    COLORS,
    new_figure,
    save_figure,
)
from litgpt_whittle.fitness.perplexity import Perplexity, RepairedPerplexity
from litgpt_whittle.results import TrainingResult
from litgpt_whittle.spaces.bins import parse_bins
from litgpt_whittle.spaces.space import Space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--n", type=int, default=40, help="sub-networks")
    parser.add_argument("--size", type=float, default=1 / 8, help="their size, as a share of the teacher's")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens per student")
    parser.add_argument("--share", default="1/1", help="2/3: every third student, from the second one on")
    parser.add_argument("--llama", action="store_true", help="train a Llama-shaped teacher and use that")
    parser.add_argument("--llama_tokens", type=int, default=4_000_000)
    parser.add_argument("--report", type=Path, default=Path("out"), help="folder for figures (CSV) and the picture")
    parser.add_argument("--only", choices=("train", "score"), help="do only this part")
    args = parser.parse_args()
    data = Data(args)
    if args.llama:
        data = train_llama(data, args.llama_tokens)
    subnets = draw(data, args.n, args.size)
    first, step = map(int, args.share.split("/"))
    name = f"rankings-{args.size:.3g}"
    path, students = args.report / f"{name}.csv", Path("out") / ("llama-" * args.llama + name)
    if args.only != "score":
        for i in list(range(args.n))[first - 1 :: step]:
            if i not in read(path):
                train(data, subnets[i], students / f"{i:02d}", args.tokens)
    if args.only != "train":
        args.report.mkdir(parents=True, exist_ok=True)
        score(data, subnets, students, path)


def draw(data: Data, n: int, share: float) -> list[SubNet]:
    """Return random sub-networks of one size from the default space."""
    teacher = data.config
    (bin,) = parse_bins(f"{int(share * n_params(teacher, SubNet.full(teacher)))}±5%")
    space, rng = Space(teacher, "coarse_layerwise", bin), np.random.default_rng(0)
    return [space.sample(rng) for _ in range(n)]


def train(data: Data, subnet: SubNet, folder: Path, tokens: int) -> None:
    """Repair and train one student, unless it is already trained."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "student/lit_model.pth").is_file():
        subnet.save(folder / "sub_network.yaml")
        flags = ["--repair.tokens=32768", *data.flags(batch=16)]
        litgpt("extract", data.teacher, folder / "sub_network.yaml", f"--out_dir={folder / 'student'}", *flags)
    if not (folder / "trained/final/lit_model.pth").is_file():
        settings = train_settings(folder / "train.yaml", data, tokens, lr=1e-3, every=10_000)
        flags = [f"--initial_checkpoint_dir={folder / 'student'}", f"--out_dir={folder / 'trained'}"]
        # four losses during training, whatever the number of tokens
        litgpt("distill", f"--config={settings}", *flags, f"--train.log_interval={max(1, tokens // 20_000)}")


def score(data: Data, subnets: list[SubNet], students: Path, path: Path) -> None:
    """Add trained students to the figures, and compare the rankings before training with the final one."""
    torch.set_num_threads(1)
    module = data.module()
    connect(module, data.teacher, 16, data.config.block_size)
    batches = validation_batches(module, data.config.block_size, 24)
    windows = calibration_windows(module, data.config.block_size, RepairedPerplexity.n_calibration).input_ids
    model = load_model(data.teacher, "SuperGPT")
    model.max_seq_length = data.config.block_size
    cut, repaired = Perplexity(model, batches), RepairedPerplexity(model, batches, calibration=windows)
    known = read(path)
    for i, subnet in enumerate(subnets):
        if i not in known:
            run = TrainingResult(students / f"{i:02d}/trained")
            if not (run.folder / "final/lit_model.pth").is_file():
                continue
            on_the_way = {f"after {row['tokens']:,} tokens": row["loss"] for row in run.rows if "loss" in row}
            known[i] = {"repaired": run.curve[0][1]} | on_the_way | {"trained": run.val_loss}
        before = {"plain cut": cut(subnet)["nll"], "repaired from moments": repaired(subnet)["nll"]}
        known[i] = before | {name: loss for name, loss in known[i].items() if name not in before}
    if not known:
        sys.exit("none of the sub-networks is trained yet")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sub-network", *known[min(known)]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"sub-network": i} | known[i] for i in sorted(known))
    print(f"{len(known)} of {len(subnets)} sub-networks are trained")
    print(f"{'loss, nats per token':24}{'best':>8}{'worst':>8}{'tau with the trained one (95 %)':>34}")
    columns = {name: [row[name] for row in known.values()] for name in known[min(known)]}
    for name, losses in columns.items():
        low, high = interval(losses, columns["trained"])
        shown = f"{tau(columns, name):.2f} ({low:.2f} to {high:.2f})"
        print(f"{name:24}{min(losses):>8.3f}{max(losses):>8.3f}{shown:>34}")
    agreed = kendalltau(columns["plain cut"], columns["repaired from moments"]).statistic
    print(f"tau of plain cut with repaired from moments: {agreed:.2f}")
    plot(columns, path.with_suffix(".png"))


def read(path: Path) -> dict[int, dict[str, float]]:
    """Return the recorded losses by the sub-network's number."""
    if not path.is_file():
        return {}
    with path.open() as file:
        rows = {int(row.pop("sub-network")): row for row in csv.DictReader(file)}
    return {i: {name: float(loss) for name, loss in row.items()} for i, row in rows.items()}


def plot(columns: dict[str, list[float]], path: Path) -> None:
    """Plot losses before training against those after it, and the agreement of the rankings during training."""
    from matplotlib.ticker import EngFormatter

    figure, [axes] = new_figure((11, 4.3), n_columns=3, sharey=False)
    for ax, name in zip(axes, ("plain cut", "repaired from moments")):
        ax.scatter(columns[name], columns["trained"], s=18, color=COLORS[0])
        ax.set(xlabel=f"loss {name}, nats per token", title=f"Kendall's τ {tau(columns, name):.2f}")
    axes[0].set_ylabel("loss after training")
    axes[1].sharey(axes[0])
    on_the_way = [(int(name.split()[1].replace(",", "")), name) for name in columns if name.startswith("after")]
    points = [(0, tau(columns, "repaired")), *((tokens, tau(columns, name)) for tokens, name in on_the_way)]
    axes[2].plot(*zip(*points), marker="o", ms=4, color=COLORS[0], label="repaired, then trained")
    for color, name in zip(COLORS[1:], ("repaired from moments", "plain cut")):
        axes[2].axhline(tau(columns, name), color=color, linestyle="--", label=name)
    axes[2].set(xlabel="tokens of training", ylabel="τ with the last ranking", title="On the way", ylim=(0, 1.03))
    axes[2].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.suptitle(f"{len(columns['trained'])} sub-networks of one size: what predicts their place after training?")
    save_figure(figure, path)
    print(f"Figures: {path.with_suffix('.csv')}; picture: {path}")


def tau(columns: dict[str, list[float]], name: str) -> float:
    return kendalltau(columns[name], columns["trained"]).statistic


def interval(losses: list[float], trained: list[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of τ by bootstrapping the sub-networks."""
    pairs = (losses, trained)
    found = bootstrap(pairs, lambda *pair: kendalltau(*pair).statistic, paired=True, vectorized=False, random_state=0)
    return found.confidence_interval


if __name__ == "__main__":
    main()
