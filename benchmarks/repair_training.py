"""Measure how long the advantage of a repair lasts: training from random weights, from a cut, and from a repaired cut.

All students have the same sizes and train on the same text without a teacher (AdamW, batches of 4,096 tokens). Reported
are the tokens, calibration included, that the repaired student needs to match the final losses of the others. A second
part spends the calibration tokens on the repair, on its refinement, or on distilling the whole cut student.

    python benchmarks/repair_training.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet

Interrupted runs resume. On one core of an older CPU, the first part takes three hours per seed.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from repair import SIZES
from students import Data, litgpt, train_settings, val_losses

from litgpt_whittle import SubNet

OUT = Path("out/repair_training")
CALIBRATION = 65_536
Curve = list[tuple[int, float]]
"""Tokens, calibration included, and the validation loss at that point"""


class Start(NamedTuple):
    """A student's initial weights, and the settings of its training."""

    tokens: int
    every: int
    lr: float = 1.5e-3
    warmup: int = 20
    extract: tuple[str, ...] | None = ()
    """Flags of `litgpt extract`; None for random weights"""

    @property
    def calibration(self) -> int:
        return CALIBRATION if self.extract else 0


REPAIR = ("--repair=true", f"--repair.tokens={CALIBRATION}")
STARTS = {
    "random weights": Start(10_000_000, every=480, warmup=100, extract=None),
    "plain cut": Start(2_000_000, every=60),
    "repaired": Start(400_000, every=20, lr=1e-3, extract=REPAIR),
    "repaired and refined": Start(
        400_000, every=20, lr=1e-3, extract=(*REPAIR, "--repair.refine_passes=1", "--repair.refine_lr=1e-3")
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--parts", nargs="*", default=["training", "same_tokens"])
    args = parser.parse_args()
    data = Data(args)
    subnet = SubNet(data.config, **SIZES["py-stdlib-8m"])
    OUT.mkdir(parents=True, exist_ok=True)
    subnet.save(OUT / "sub_network.yaml")
    if "training" in args.parts:
        curves = {name: [train(data, subnet, name, seed) for seed in args.seeds] for name in reversed(STARTS)}
        report(curves)
        plot(curves, OUT / "repair_training.png")
    if "same_tokens" in args.parts:
        same_tokens(data)


def student(data: Data, name: str, start: Start, seed: int) -> Path:
    """Return the student before training."""
    folder = OUT / f"{name.replace(' ', '-')}-{seed}" / "start"
    if not (folder / "lit_model.pth").is_file():
        flags = [*start.extract, *data.flags(batch=16, seed=seed)] if start.extract else []
        litgpt("extract", data.teacher, OUT / "sub_network.yaml", f"--out_dir={folder}", *flags)
    return folder


def train(data: Data, subnet: SubNet, name: str, seed: int) -> Curve:
    """Train one student."""
    start, folder = STARTS[name], OUT / f"{name.replace(' ', '-')}-{seed}"
    folder.mkdir(exist_ok=True)
    if not (folder / "trained/final/lit_model.pth").is_file():
        config = subnet.config if start.extract is None else None
        settings = train_settings(folder / "train.yaml", data, start.tokens, start.lr, start.every, seed, config)
        flags = [f"--out_dir={folder / 'trained'}", f"--train.lr_warmup_steps={start.warmup}"]
        if config is None:
            flags.append(f"--initial_checkpoint_dir={student(data, name, start, seed)}")
        litgpt("distill", f"--config={settings}", *flags)
    curve = [(tokens + start.calibration, loss) for tokens, loss in val_losses(folder / "trained")]
    print(f"{name}, seed {seed}: {curve[0][1]:.3f} before training, {curve[-1][1]:.3f} after {curve[-1][0]:,} tokens")
    return curve


def report(curves: dict[str, list[Curve]]) -> None:
    """Print how many times fewer tokens the repaired students need."""
    for name in ("repaired", "repaired and refined"):
        for rival, goal in (("random weights", 20), ("plain cut", 5)):
            ratios = []
            for ours, theirs in zip(curves[name], curves[rival]):
                end, target = theirs[-1]
                ratios.append(end / next((tokens for tokens, loss in ours if loss <= target), math.inf))
            each = ", ".join(f"{ratio:.1f}" for ratio in ratios)
            print(
                f"{name}: {statistics.median(ratios):.1f} × fewer tokens (by seed: {each}) than {rival} to its "
                f"final loss (goal {goal})"
            )


def same_tokens(data: Data) -> None:
    """Compare uses of the calibration tokens."""
    cut, calibration = student(data, "plain cut", STARTS["plain cut"], 1), f"{CALIBRATION:,} tokens"
    for name in ("plain cut", "repaired", "repaired and refined"):
        ((_, loss), *_) = val_losses(OUT / f"{name.replace(' ', '-')}-1/trained")
        print(f"{name + (f' on {calibration}' if STARTS[name].extract else ''):48}{loss:.3f}")
    found = {}
    for lr in (1e-3, 2e-3, 4e-3):
        folder = OUT / f"distilled-{lr:g}"
        if not (folder / "final/lit_model.pth").is_file():
            settings = train_settings(OUT / "distilled.yaml", data, CALIBRATION, lr, every=10_000, seed=1)
            flags = [f"--initial_checkpoint_dir={cut}", f"--teacher_checkpoint_dir={data.teacher}"]
            flags += ["--distill.beta=1", "--train.global_batch_size=4", "--train.micro_batch_size=4"]
            litgpt("distill", f"--config={settings}", f"--out_dir={folder}", *flags)
        found[lr] = val_losses(folder)[-1][1]
    best, rates = min(found, key=found.get), ", ".join(map(str, found))
    print(f"{f'distilled as a whole on {calibration}':48}{found[best]:.3f}   (the best of lr {rates}: {best})")


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    """Plot validation loss over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, runs) in enumerate(reversed(curves.items())):
        for j, run in enumerate(runs):
            # the cut and random weights begin at 0 tokens, which a log scale cannot show
            tokens, losses = zip(*((tokens, loss) for tokens, loss in run if tokens))
            axes.plot(tokens, losses, ".-", color=f"C{i}", linewidth=1, label=None if j else name)
    axes.set(xscale="log", xlabel="tokens, those to calibrate counted", ylabel="validation NLL")
    axes.set_ylim(top=6)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    axes.set_title(f"Students of the same sizes, {len(runs)} seeds", loc="left")
    figure.savefig(path, dpi=120)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
