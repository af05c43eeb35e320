"""Compare one cut to half of a teacher's size with a cascade of two cuts, with equal numbers of tokens.

For each seed, three students of the same shape, 50 % of the teacher's size, are extracted with a repair and distilled:

- one cut: from the teacher, trained on all tokens;
- cascade, first: a student of 71 % is trained on half of the tokens and cut to 50 %. That student is trained on the
  other half, with the teacher's help;
- cascade, nearest: the same, with the help of the student of 71 %.

Both cascades share the first student and its cut. Calibration tokens are halved in the same way. The seed orders the
text of calibration and training. Finished steps are kept, so that an interrupted run resumes.

    python benchmarks/cascade.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet
"""

import argparse
import math
from pathlib import Path
from statistics import mean, stdev

from students import Data, litgpt, train_settings, val_losses

from litgpt_whittle import SubNet, n_params
from litgpt_whittle.results import Checkpoint

ONE, BETWEEN, FIRST, NEAREST = "one cut", "71 %, between", "cascade, first", "cascade, nearest"

SIZES = {
    "71": {"n_embd": 224, "n_query_groups": 7, "intermediate_size": 704},
    "50": {"n_embd": 192, "n_query_groups": 6, "intermediate_size": 480},
}
"""Shapes of the students of a teacher with 256 channels, 8 heads and 1,024 neurons per layer. A repair chooses the
units."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65_536, help="training tokens of each way to half the size")
    parser.add_argument("--calibration", type=int, default=32_768, help="calibration tokens of each way")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=Path("out/cascade"))
    args = parser.parse_args()
    found = [Ways(args, seed).run() for seed in range(args.seeds)]
    print(f"{'perplexity':20}" + "".join(f"{f'seed {seed}':>18}" for seed in range(args.seeds)) + f"{'mean':>18}")
    for way in found[0]:
        losses = [each[way] for each in found]
        shown = [*losses, tuple(map(mean, zip(*losses)))]
        print(f"{way:20}" + "".join(f"{f'{math.exp(one):.2f} -> {math.exp(two):.2f}':>18}" for one, two in shown))
    for way in (FIRST, NEAREST):
        gains = [each[ONE][1] - each[way][1] for each in found]
        spread = f" ± {stdev(gains) / math.sqrt(len(gains)):.4f}" if len(gains) > 1 else ""
        print(f"{way}: loss lower than after one cut by {mean(gains):+.4f}{spread} nats per token (standard error)")


class Ways:
    """The students of one seed.

    Args:
        args: The command line.
        seed: Seed of repairs and trainings, and of the order of the text.
    """

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed, self.data = args, seed, Data(args)
        self.folder = args.out / f"seed-{seed}"

    def run(self) -> dict[str, tuple[float, float]]:
        """Return the validation losses of each student before and after its training, in nats per token."""
        teacher, n, c = self.args.teacher, self.args.tokens, self.args.calibration
        found = {ONE: self.train(ONE, self.cut("50", teacher, "50", c), teacher, n)}
        found[BETWEEN] = self.train(BETWEEN, self.cut("71", teacher, "71", c // 2), teacher, n // 2)
        middle = self.folder / BETWEEN / "final"
        start = self.cut("71-50", middle, "50", c // 2)
        found[FIRST] = self.train(FIRST, start, teacher, n // 2)
        found[NEAREST] = self.train(NEAREST, start, middle, n // 2)
        return found

    def cut(self, name: str, teacher: Path, size: str, calibration: int) -> Path:
        """Return the repaired student of one of `SIZES`, cut from any teacher."""
        student, path = self.folder / name, self.folder / f"{name}.yaml"
        if not (student / "lit_model.pth").is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            config = Data(argparse.Namespace(**vars(self.args) | {"teacher": teacher})).config
            subnet = SubNet(config, **SIZES[size])
            subnet.save(path)
            flags = (*self.data.flags(batch=16, seed=self.seed), f"--repair.tokens={calibration}")
            litgpt("extract", teacher, path, f"--out_dir={student}", f"--seed={self.seed}", *flags)
            share = Checkpoint(student).n_params / n_params(self.data.config, SubNet.full(self.data.config))
            print(f"seed {self.seed}, cut {name}: {share:.1%} of the teacher", flush=True)
        return student

    def train(self, name: str, start: Path, teacher: Path, tokens: int) -> tuple[float, float]:
        """Distill a student, and return its validation losses before and after."""
        folder = self.folder / name
        if not (folder / "final/lit_model.pth").is_file():
            path = self.folder / f"{name}.yaml"
            settings = train_settings(path, self.data, tokens, self.args.lr, every=10_000, seed=self.seed)
            flags = ["--distill.alpha=0", "--distill.beta=1", "--train.global_batch_size=8"]
            flags += ["--train.micro_batch_size=8", "--train.lr_warmup_steps=2", f"--train.min_lr={self.args.lr / 10}"]
            flags += ["--eval.max_iters=16"]  # 32,768 tokens with blocks of 256
            flags += [f"--initial_checkpoint_dir={start}", f"--teacher_checkpoint_dir={teacher}"]
            litgpt("distill", f"--config={settings}", *flags, f"--out_dir={folder}")
        curve = val_losses(folder)
        print(f"seed {self.seed}, {name}: {curve[0][1]:.4f} -> {curve[-1][1]:.4f}", flush=True)
        return curve[0][1], curve[-1][1]


if __name__ == "__main__":
    main()
