"""Measure cost and quality of super-network training against extracted networks and plain training.

    python benchmarks/supernet.py
    python benchmarks/supernet.py --parts quality --teacher CHECKPOINT_DIR --train train.parquet \
        --validation validation.parquet

Cost: one step of a sandwich (the full network, the smallest, two random ones) on a super-network, against the same four
networks as standalone models; forward and backward, interleaved, medians of CPU seconds.

Quality: a teacher is trained further on the same number of tokens, by sandwiches and plainly, several seeds each.
Reported are the losses of the full networks, and of the best sub-networks of a third of the size that the same search
finds in both. Interrupted runs resume.
"""

import argparse
import math
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from litgpt.config import Config
from search_memory import random_teacher
from students import Data, litgpt, search, train_settings, val_losses

from litgpt_whittle.distillation.head import LossModel
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.evaluations import best_of
from litgpt_whittle.samplers import Sandwich
from litgpt_whittle.spaces.args import (
    SizeArgs,
    SpaceArgs,
)
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import extract_weights, student_model
from litgpt_whittle.supernet import (
    SuperLossModel,
    SupernetStep,
)

OUT = Path("out/supernet")
LIMIT = 1.1


def measure_cost(args: argparse.Namespace) -> None:
    """Measure the cost ratio in a coarse and in a fine space."""
    print(f"{platform.machine()}, Python {platform.python_version()}, PyTorch {torch.__version__}, one thread")
    config = Config.from_name(args.name)
    model = random_teacher(config).train().requires_grad_(True)
    ids, targets = torch.randint(config.vocab_size, (2, args.batch, args.tokens))
    half = SizeArgs(
        n_embd=config.n_embd // 2, n_layer=config.n_layer // 2, intermediate_size=config.intermediate_size // 2
    )
    root = SuperLossModel(model)
    for name in ("coarse_layerwise", "fine_layerwise"):
        sampler = Sandwich(Space(config, name, args=SpaceArgs(smallest=half)))
        step = SupernetStep(root, root, sampler, lambda done: Objective(), seed=0, n_iters=1000, accumulation=1)
        parts = [extracted(model, network) for network in step.networks(0.0)]
        seconds: dict[str, list[float]] = {"step": [], "parts": []}
        for _ in range(args.repeats + 1):
            started = time.process_time()
            loss = step(ids, targets, lambda loss: loss.backward(), 0.0)["loss"]
            seconds["step"].append(time.process_time() - started)
            started = time.process_time()
            losses = []
            for part in parts:
                part_loss = part(ids, targets).loss
                part_loss.backward()
                losses.append(part_loss.item())
            seconds["parts"].append(time.process_time() - started)
            for trained_model in (model, *parts):
                trained_model.zero_grad()
        assert math.isclose(loss, sum(losses) / len(losses), rel_tol=1e-4), "not the same networks"
        ours, theirs = (statistics.median(times[1:]) for times in seconds.values())  # the first round is a warm-up
        print(
            f"{name}: {ours:.2f} s a step, {theirs:.2f} s its parts: {ours / theirs:.2f} × (limit {LIMIT})", flush=True
        )


def extracted(model: torch.nn.Module, network: SubNet | None) -> LossModel:
    """Return a network as a standalone model."""
    subnet = network or SubNet.full(model.config)
    student = student_model(subnet)
    student.load_state_dict(extract_weights(model, subnet))
    return LossModel(student)


def measure_quality(args: argparse.Namespace) -> None:
    """Measure the losses of full networks and of the best sub-networks."""
    data = Data(args)
    OUT.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[float, float]]] = {"standard": [], "sandwich": []}
    for seed in args.seeds:
        for sampler, losses in found.items():
            folder = trained(data, args, sampler, seed)
            own = Data(argparse.Namespace(teacher=folder / "final", train=data.train, validation=data.validation))
            flags = ["--space=fine_layerwise", f"--seed={seed}", "--eval.max_iters=2", "--strategy=EvoPress"]
            (best,) = best_of(search(own, folder / "search", args.iterations, *flags)).values()
            losses.append((val_losses(folder)[-1][1], best.score("nll")))
            full, part = losses[-1]
            print(f"{sampler}, seed {seed}: full network {full:.3f}, best of a third {part:.3f}", flush=True)
    for i, what in enumerate(("full network", "best of a third")):
        standard, sandwich = ([losses[i] for losses in found[name]] for name in found)
        shown = [f"{statistics.mean(x):.3f} ± {np.std(x):.3f}" for x in (standard, sandwich)]
        print(f"{what:16} NLL, trained plainly {shown[0]}, by sandwiches {shown[1]}")


def trained(data: Data, args: argparse.Namespace, sampler: str, seed: int) -> Path:
    """Return the teacher after further training."""
    folder = OUT / f"{sampler}-{seed}"
    if not (folder / "final/lit_model.pth").is_file():
        path = train_settings(folder.with_suffix(".yaml"), data, args.training_tokens, args.lr, every=10_000, seed=seed)
        settings = yaml.safe_load(path.read_text())
        del settings["distill"], settings["compile"]
        third = SizeArgs(n_embd=data.config.n_embd // 2, n_query_groups=data.config.n_query_groups // 2)
        third.intermediate_size, third.n_layer = data.config.intermediate_size // 4, data.config.n_layer // 2
        settings["supernet"] = {
            "space": "fine_layerwise",
            "sampler": sampler,
            "n_validated": 0,
            "search_space": {"smallest": vars(third)},
        }
        path.write_text(yaml.safe_dump(settings))
        flags = [f"--config={path}", f"--initial_checkpoint_dir={data.teacher}"]
        litgpt("pretrain_supernet", *flags, f"--out_dir={folder}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=["cost", "quality"], default=["cost"])
    parser.add_argument("--name", default="pythia-70m", help="litgpt model of the network's shape, for the cost")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--teacher", type=Path, help="a litgpt checkpoint, for the quality")
    parser.add_argument("--train", type=Path, help="text that the teacher was trained on")
    parser.add_argument("--validation", type=Path, help="text that the teacher was not trained on")
    parser.add_argument("--training_tokens", type=int, default=500_000)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--iterations", type=int, default=60, help="evaluations of each search")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "cost" in args.parts:
        measure_cost(args)
    if "quality" in args.parts:
        if None in (args.teacher, args.train, args.validation):
            parser.error("the quality needs --teacher, --train and --validation")
        measure_quality(args)


if __name__ == "__main__":
    main()
