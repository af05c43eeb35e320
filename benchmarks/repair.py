"""Measure a repair without further training: share of the gap to the teacher, time, and calibration tokens needed.

    python benchmarks/repair.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet

With --llama, a Llama-shaped teacher (RMSNorm, gated MLP, grouped queries, no biases) is first trained on the same text
with the same tokenizer, and replaces the given one.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from litgpt.config import Config
from students import Data, litgpt, train_settings, validate

from litgpt_whittle import SubNet, load_model, n_params
from litgpt_whittle.batches import calibration_windows, connect, validation_batches
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.checkpoint import read_weights
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.repair.sequential import SequentialRepair
from litgpt_whittle.scratch import Scratch
from litgpt_whittle.supergpt import extract_weights, student_model

OUT = Path("out/repair")
LLAMA = dict(
    name="Llama-3.2-1B", n_layer=8, n_embd=192, n_head=6, n_query_groups=3, intermediate_size=512, block_size=256
)
SIZES = {
    "py-stdlib-8m": dict(n_embd=148, n_query_groups=4, intermediate_size=392),
    "llama": dict(n_embd=104, n_query_groups=2, intermediate_size=176),
}
"""Sub-networks of a third of the size"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--llama", action="store_true", help="train a Llama-shaped teacher and use that")
    parser.add_argument("--llama_tokens", type=int, default=4_000_000)
    parser.add_argument("--n_embd", type=int, help="the student's channels; heads and neurons scale with them")
    parser.add_argument("--n_query_groups", type=int)
    parser.add_argument("--intermediate_size", type=int)
    parser.add_argument("--refine_passes", type=float, default=1.0)
    parser.add_argument("--refine_lr", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768, 131072, 524288])
    parser.add_argument("--parts", nargs="*", default=["gap", "time", "tokens"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    data = Data(args)
    if args.llama:
        data = train_llama(data, args.llama_tokens)
    asked = {name: getattr(args, name) for name in ("n_embd", "n_query_groups", "intermediate_size")}
    sizes = {name: size for name, size in asked.items() if size} or SIZES["llama" if args.llama else "py-stdlib-8m"]
    bench = Bench(data, SubNet(data.config, **sizes))
    if "gap" in args.parts:
        bench.gap(args.refine_passes, args.refine_lr)
    if "time" in args.parts:
        bench.seconds()
    if "tokens" in args.parts:
        bench.calibration_tokens(args.tokens, OUT / f"tokens-{'llama' if args.llama else 'pythia'}.png")


def train_llama(data: Data, tokens: int) -> Data:
    """Return the data with a Llama-shaped teacher on the same text and tokenizer, trained unless it exists."""
    folder = OUT / "llama"
    config = Config.from_name(**LLAMA, vocab_size=data.config.vocab_size, padded_vocab_size=data.config.vocab_size)
    if not (folder / "final/lit_model.pth").is_file():
        OUT.mkdir(parents=True, exist_ok=True)
        settings = train_settings(OUT / "llama.yaml", data, tokens, lr=2e-3, every=240, config=config)
        print(f"training a Llama-shaped teacher on {tokens:,} tokens", flush=True)
        litgpt("distill", f"--config={settings}", f"--out_dir={folder}", "--eval.max_iters=8")
    data.teacher, data.config = folder / "final", Config.from_checkpoint(folder / "final")
    return data


class Bench:
    """A teacher and a student of a third of its size."""

    def __init__(self, data: Data, subnet: SubNet) -> None:
        self.data, self.subnet, self.length = data, subnet, data.config.block_size
        self.weights = read_weights(data.teacher)
        module = data.module()
        connect(module, data.teacher, 16, self.length)
        self.validation = validation_batches(module, self.length, 1000)
        self.teacher_nll = validate(load_model(data.teacher), self.validation)
        self.share = n_params(subnet.teacher, subnet) / n_params(subnet.teacher, SubNet.full(subnet.teacher))

    def windows(self, n_tokens: int, seed: int = 42) -> torch.Tensor:
        module = self.data.module(seed)
        connect(module, self.data.teacher, 16, self.length)
        return calibration_windows(module, self.length, n_tokens).input_ids

    def repair(self, windows: torch.Tensor, **args) -> tuple[float, float]:
        """Return the NLL of the repaired student, and the seconds of the repair."""
        started = time.perf_counter()
        scratch = Scratch(OUT / "scratch", repr((args, windows.shape, time.time())))
        repaired = SequentialRepair(self.weights, self.subnet, Calibration(windows), RepairArgs(**args), scratch).run(
            False
        )
        seconds = time.perf_counter() - started
        scratch.remove()
        student = student_model(repaired.subnet).eval()
        student.load_state_dict(repaired.weights)
        return validate(student, self.validation), seconds

    def gap(self, refine_passes: float, refine_lr: float) -> None:
        """Print the table of students before training."""
        cut = student_model(self.subnet).eval()
        cut.load_state_dict(extract_weights(self.weights, self.subnet))
        windows = self.windows(65_536)
        print(
            f"student of {self.share:.1%}, {windows.numel():,} tokens to calibrate; teacher NLL {self.teacher_nll:.3f}"
        )
        first = validate(cut, self.validation)
        print(f"{'plain cut (first entries)':40}{first:>8.3f}", flush=True)
        for name, args in {
            "repaired, coordinates": {"basis": "coordinates", "choose_units": False, "head_passes": 0},
            "repaired, coordinates, units chosen": {"basis": "coordinates", "head_passes": 0},
            "repaired, principal directions": {"choose_units": False, "head_passes": 0},
            "repaired, both: all of the closed form": {"head_passes": 0},
            "the same, and the head (the default)": {},
            f"the same, refined end to end, {refine_passes:g} passes": {
                "refine_passes": refine_passes,
                "refine_lr": refine_lr,
            },
        }.items():
            nll = self.repair(windows, **args)[0]
            share = (nll - self.teacher_nll) / (first - self.teacher_nll)
            print(f"{name:40}{nll:>8.3f}{share:>8.3f} of the gap", flush=True)

    def seconds(self) -> None:
        """Time the repair against a teacher's pass over the same tokens, interleaved."""
        windows, model = self.windows(65_536), load_model(self.data.teacher)
        model.max_seq_length = self.length
        passes, repairs = [], []
        for _ in range(3):
            started = time.perf_counter()
            with torch.inference_mode():
                for ids in windows.split(16):
                    model(ids)
            passes.append(time.perf_counter() - started)
            repairs.append(self.repair(windows)[1])
        one, other = statistics.median(passes), statistics.median(repairs)
        print(f"a pass of the teacher {one:.1f} s, the repair {other:.1f} s: {other / one:.2f} x (limit 3)")

    def calibration_tokens(self, counts: list[int], path: Path) -> None:
        """Measure the NLL against the number of calibration tokens."""
        from matplotlib.figure import Figure

        nlls = [self.repair(self.windows(n))[0] for n in counts]
        for n, nll in zip(counts, nlls):
            print(f"{n:>9,} calibration tokens: NLL {nll:.3f}", flush=True)
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(counts, nlls, "o-")
        axes.set(xscale="log", xlabel="calibration tokens", ylabel="validation NLL of the repaired student")
        axes.set_xticks(counts, [f"{n // 1024}k" for n in counts])
        axes.minorticks_off()
        axes.set_title(f"A student of {self.share:.0%}, before any training (teacher: {self.teacher_nll:.2f})")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)
        print(f"Picture: {path}")


if __name__ == "__main__":
    main()
