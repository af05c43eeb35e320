"""Measure peak memory of scoring candidates above the teacher's weights: 50k vocabulary, batches of 4 × 2,048 tokens.

The teacher has random fp32 weights of Pythia-410M's shape. Each method runs in its own process, which loads the teacher
and then scores candidates of a third of its size on one batch each. The peak is the largest resident size minus the
size after the teacher was loaded.

    python benchmarks/search_memory.py
    python benchmarks/search_memory.py --name pythia-160m --candidates 4
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle.batches import Batch
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.processes import peak_resident
from litgpt_whittle.registry import lookup
from litgpt_whittle.spaces.bins import parse_bins
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT

LIMIT = 600e6
"""Maximum memory of a search above the teacher's weights, in bytes"""

WAYS = [(fitness, space) for fitness in ("perplexity", "kl") for space in ("coarse_layerwise", "fine_layerwise")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="pythia-410m", help="litgpt model of the teacher's shape")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch")
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print("RESULT", json.dumps(measure(args)))
        return
    print(f"{platform.machine()}, Python {platform.python_version()}, PyTorch {torch.__version__}, one thread")
    print(f"{args.name}, {args.batch} × {args.tokens} tokens; limit {LIMIT / 1e6:.0f} MB above the teacher's weights")
    failed = False
    for way in WAYS:
        command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--way", ",".join(way)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.partition("RESULT")[2])
        failed |= way[0] == "perplexity" and found["peak"] > LIMIT
        sizes = ", ".join(
            f"{found[name] / 1e6:,.0f} MB {name}" for name in ("imports", "weights", "candidate", "cache")
        )
        print(
            f"{way[0]:<12}{way[1]:<18}{found['peak'] / 1e6:>7,.0f} MB   ({sizes}; {found['seconds']:.0f} s each)",
            flush=True,
        )
    sys.exit(failed)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return bytes: before the teacher, of its weights, of a candidate's weights, and the peak that scoring adds."""
    torch.set_num_threads(1)
    fitness, space = args.way.split(",")
    config = Config.from_name(args.name)
    imports = resident()
    model = random_teacher(config)
    batch = torch.randint(config.vocab_size, (args.batch, args.tokens + 1), generator=torch.Generator().manual_seed(0))
    (bin,) = parse_bins(f"{n_params(config, SubNet.full(config)) // 3}±5%")
    before = resident()
    score = lookup("litgpt_whittle.fitness", fitness)(model, [Batch(batch[:, :-1], batch[:, 1:])])
    candidates, rng = Space(config, space, bin), np.random.default_rng(0)
    sizes, started = [], time.perf_counter()
    for _ in range(args.candidates):
        candidate = candidates.sample(rng)
        sizes.append(n_params(config, candidate) * 4)
        score(candidate)
    seconds = (time.perf_counter() - started) / args.candidates
    peak = peak_resident()
    cached = sum(batch.hidden.numel() * 4 for batch in score.batches) if fitness == "kl" else 0
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    found = {"imports": imports, "weights": weights, "candidate": max(sizes), "cache": cached}
    return found | {"peak": peak - before, "seconds": seconds}


def random_teacher(config: Config) -> SuperGPT:
    """Return a teacher with made-up weights, never holding two copies of one."""
    with torch.device("meta"):
        model = SuperGPT(config)
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.empty(shape).normal_(std=0.02, generator=generator) for name, shape in shapes.items()}
    model.load_state_dict(weights, assign=True)
    model.cos, model.sin = model.rope_cache(device="cpu")
    return model.eval().requires_grad_(False)


def resident() -> int:
    """Return the resident size of this process in bytes."""
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    main()
