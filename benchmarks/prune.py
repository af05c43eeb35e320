"""Measure the perplexity of a trained teacher after pruning, by method, pattern and refit, against whittle's pruning.

    python benchmarks/prune.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet

With --whittle_python, whittle's pruners get the same calibration windows, and their pruned weights are scored here on
the same text. Only N:M patterns are compared: for unstructured sparsity, only whittle's SparseGPT works.
"""

import argparse
import os
import resource
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from students import Data

from litgpt_whittle import SubNet, load_model
from litgpt_whittle.batches import calibration_windows, connect, validation_batches
from litgpt_whittle.checkpoint import read_weights
from litgpt_whittle.contrib.prune import Magnitude, SparseGPT, Sparsity, Wanda
from litgpt_whittle.contrib.prune.pruning import Pruning, maps_to_prune
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.scratch import Scratch

METHODS = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}

WHITTLE = """
import sys
from pathlib import Path
import torch
from litgpt.config import Config
from whittle import pruning
from whittle.models.gpt import GPT

folder, teacher, pruner = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
n, m, batch_size = map(int, sys.argv[4:])
windows = torch.load(folder / "windows.pt")
config = Config.from_checkpoint(teacher)
config.fix_head_size = True
model = GPT(config)
model.load_state_dict(torch.load(folder / "weights.pt"))
model.max_seq_length = windows.shape[1]
model.eval()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(windows), batch_size)
with torch.no_grad():
    getattr(pruning, pruner + "Pruner")()(
        model, prune_n=m - n, prune_m=m, dataloader=loader, nsamples=len(loader), device="cpu"
    )
torch.save(model.state_dict(), folder / "pruned.pt")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--sparsities", nargs="*", default=["0.5", "2:4"], help="shares and patterns")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--refit", action="store_true", help="also refit the remaining weights in closed form")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--batches", type=int, default=1000, help="validation batches of 16 windows")
    parser.add_argument("--whittle_python", type=Path)
    parser.add_argument("--whittle_batch", type=int, default=1, help="windows per batch in whittle")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(Data(args), args.tokens, args.batches)
    sparsities = [parse(sparsity) for sparsity in args.sparsities]
    n_scored = sum(batch.n_tokens for batch in bench.validation)
    print(f"{bench.windows.numel():,} calibration tokens, {n_scored:,} of validation, CPU seconds in brackets")
    print(f"{'':<24}" + "".join(f"{sparsity!s:>18}" for sparsity in sparsities))
    print(f"{'teacher':<24}{bench.perplexity():>10.3f}", flush=True)
    for refit in (False, True)[: 1 + args.refit]:
        for name in args.methods:
            show(name + ", refitted" * refit, [bench.ours(name, sparsity, refit) for sparsity in sparsities])
    for name in args.methods if args.whittle_python else ():
        rival = partial(bench.whittle, args.whittle_python, args.whittle_batch, name)
        show(f"whittle, {name}", [rival(sparsity) for sparsity in sparsities])


def parse(text: str) -> Sparsity:
    return Sparsity.parse(None, text) if ":" in text else Sparsity.parse(float(text), None)


def show(label: str, found: list[tuple[float, float] | None]) -> None:
    cells = ["none" if pair is None else f"{pair[0]:.3f} ({pair[1]:.0f} s)" for pair in found]
    print(f"{label:<24}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def children_seconds() -> float:
    """Return the CPU seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Bench:
    """A teacher with its calibration and validation data."""

    def __init__(self, data: Data, tokens: int, batches: int) -> None:
        self.data, self.weights = data, read_weights(data.teacher)
        module, length = data.module(), data.config.block_size
        connect(module, data.teacher, 16, length)
        self.windows = calibration_windows(module, length, tokens).input_ids
        self.validation = validation_batches(module, length, batches)

    def perplexity(self, weights: dict[str, torch.Tensor] | None = None) -> float:
        """Return the perplexity of the teacher, or of other weights, on the whole validation text."""
        model = load_model(self.data.teacher, "SuperGPT", dtype=torch.float32)
        if weights is not None:
            model.load_state_dict(weights, assign=True)
        return Perplexity(model, self.validation)(SubNet.full(model.config))["perplexity"]

    def ours(self, method: str, sparsity: Sparsity, refit: bool) -> tuple[float, float]:
        """Return the perplexity of the pruned teacher, and the CPU seconds of pruning."""
        shape = SubNet.full(self.data.config)
        windows = self.windows if METHODS[method].reads_data or refit else None
        maps = maps_to_prune(shape, ["attn", "mlp"], sparsity)
        with tempfile.TemporaryDirectory() as folder:
            scratch, started = Scratch(Path(folder) / "scratch", "key"), time.process_time()
            run = Pruning(shape, self.weights, maps, METHODS[method](sparsity), scratch, windows, 16, refit)
            weights, _ = run.run(progress=False)
            seconds = time.process_time() - started
        return self.perplexity(weights), seconds

    def whittle(self, python: Path, batch_size: int, method: str, sparsity: Sparsity) -> tuple[float, float] | None:
        """Return the same for whittle's pruner; its time includes the start of the process."""
        if sparsity.pattern is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            torch.save(self.windows, f"{folder}/windows.pt")
            torch.save(dict(self.weights), f"{folder}/weights.pt")
            arguments = [folder, self.data.teacher, METHODS[method].__name__, *sparsity.pattern, batch_size]
            environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
            started = children_seconds()
            subprocess.run([python, "-c", WHITTLE, *map(str, arguments)], check=True, env=environment)
            seconds = children_seconds() - started
            weights = torch.load(f"{folder}/pruned.pt", weights_only=True)
        return self.perplexity({name: weights[name] for name in self.weights}), seconds


if __name__ == "__main__":
    main()
