"""Measure tokens per second of scoring a sub-network inside its teacher, against the extracted model and whittle.

The teacher has random weights of Pythia-160M's shape; one candidate of a third of its size comes from the coarse and
one from the fine layer-wise space. The methods alternate on the same batches. Reported are medians of CPU seconds,
which other load on the machine disturbs less than wall time. Our time includes slicing the weights, which the extracted
model no longer needs. whittle runs in its own process, which answers over a pipe.

    python benchmarks/search_throughput.py
    python benchmarks/search_throughput.py --whittle_python WHITTLE_ENVIRONMENT/bin/python

whittle's commands do not support layer-wise sub-networks, but its `GPT.set_sub_network` takes indices for each layer,
also for a fine space. The comparison is made only if its loss of each candidate equals ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from litgpt.config import Config
from search_memory import random_teacher

from litgpt_whittle.batches import Batch
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.spaces.bins import parse_bins
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import extract_weights, student_model

GOALS = {("coarse_layerwise", "extracted"): 0.95, ("fine_layerwise", "extracted"): 0.95}
GOALS |= {("coarse_layerwise", "whittle"): 1.3, ("fine_layerwise", "whittle"): 2.0}

Way = Callable[[str], tuple[float, float]]
"""By space: the candidate's loss, and the CPU seconds of scoring it"""

RIVAL = """
import json, sys, time
import torch, torch.nn.functional as F
from litgpt.config import Config
from whittle.models.gpt import GPT
torch.set_num_threads(1)
given = torch.load(sys.argv[1])
model = GPT(Config.from_name(given["name"])).eval()
model.load_state_dict(given["weights"])
model.max_seq_length = given["batches"][0][0].shape[1]
for line in sys.stdin:
    start = time.process_time()
    with torch.inference_mode():
        model.set_sub_network(**given["subnets"][line.strip()])
        losses = [F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()) for ids, targets in given["batches"]]
        loss = float(torch.stack(losses).mean())
    print(json.dumps([loss, time.process_time() - start]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="pythia-160m", help="litgpt model of the teacher's shape")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--whittle_python", help="the Python of an environment that has whittle")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = Config.from_name(args.name)
    model = random_teacher(config)
    model.max_seq_length = args.tokens
    rows = torch.randint(config.vocab_size, (args.batches, args.batch, args.tokens + 1))
    batches = [Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in rows]
    subnets = {space: draw(config, space) for space in ("coarse_layerwise", "fine_layerwise")}
    score = Perplexity(model, batches)
    students = {}
    for space, subnet in subnets.items():
        students[space] = student_model(subnet)
        students[space].load_state_dict(extract_weights(model, subnet))
        students[space].eval().requires_grad_(False)
    ways: dict[str, Way] = {
        "ours": timed(lambda space: score(subnets[space])["nll"]),
        "extracted": timed(lambda space: plain(students[space], batches)),
    }
    if args.whittle_python:
        ways["whittle"] = rival(args.whittle_python, args.name, model, subnets, batches)
    print(f"{platform.machine()}, Python {platform.python_version()}, PyTorch {torch.__version__}, one thread")
    print(f"{args.name}, {args.batches} batches of {args.batch} × {args.tokens} tokens, {args.repeats} rounds")
    missed = False
    for space in subnets:
        seconds = race(ways, space, args.repeats)
        n_tokens = score.n_tokens
        for way, times in seconds.items():
            ratio = statistics.median(times) / statistics.median(seconds["ours"])
            goal = GOALS.get((space, way))
            missed |= goal is not None and ratio < goal
            against = "" if goal is None else f"   ours is {ratio:.2f} × as fast, goal {goal}"
            print(
                f"{space:<18}{way:<12}{n_tokens / statistics.median(times):>8,.0f} tokens per CPU second{against}",
                flush=True,
            )
    sys.exit(missed)


def draw(config: Config, space: str) -> SubNet:
    (bin,) = parse_bins(f"{n_params(config, SubNet.full(config)) // 3}±5%")
    return Space(config, space, bin).sample(np.random.default_rng(0))


@torch.inference_mode()
def plain(model: torch.nn.Module, batches: list[Batch]) -> float:
    """Return the mean loss of a standalone model by plain PyTorch."""
    losses = [F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()) for ids, targets in batches]
    return float(torch.stack(losses).mean())


def timed(run: Callable[[str], float]) -> Way:
    def way(space: str) -> tuple[float, float]:
        start = time.process_time()
        return run(space), time.process_time() - start

    return way


def race(ways: dict[str, Way], space: str, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each method, interleaved; the first round warms up and compares the losses."""
    losses = {name: way(space)[0] for name, way in ways.items()}
    if max(losses.values()) - min(losses.values()) > 1e-3:
        sys.exit(f"error: the methods score different models: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(way(space)[1])
    return seconds


def rival(python: str, name: str, model: torch.nn.Module, subnets: dict[str, SubNet], batches: list[Batch]) -> Way:
    """Start whittle with the same weights, batches and sub-networks; return a function that requests a score."""
    choices = {space: whittle_choice(subnet) for space, subnet in subnets.items()}
    given = {"name": name, "weights": model.state_dict(), "subnets": choices}
    given["batches"] = [(batch.input_ids, batch.targets) for batch in batches]
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "given.pt"
        torch.save(given, path)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([python, "-c", RIVAL, str(path)], env=environment, **pipes)

        def ask(space: str) -> tuple[float, float]:
            process.stdin.write(space + "\n")
            process.stdin.flush()
            return tuple(json.loads(process.stdout.readline()))

        ask(next(iter(choices)))  # the process has read the file by now
    return ask


def whittle_choice(subnet: SubNet) -> dict:
    """Return whittle's arguments for a sub-network, with indices where the units are no prefix."""
    layers = [subnet.layer(i) for i in range(len(subnet))]
    choice = {
        "sub_network_n_embd": len(subnet.n_embd),
        "sub_network_n_layers": len(subnet),
        "sub_network_intermediate_size": [len(keep.intermediate_size) for keep in layers],
        "sub_network_num_heads": [len(keep.n_query_groups) for keep in layers],
        "sub_network_query_groups": [len(keep.n_query_groups) for keep in layers],
        "sub_network_head_size": subnet.teacher.head_size,
        "sampled_layer_indices": list(subnet.layers),
    }
    if not subnet.n_embd.is_prefix:
        choice["sampled_embd_indices"] = subnet.n_embd.indices.tolist()
    if not all(keep.intermediate_size.is_prefix and keep.n_query_groups.is_prefix for keep in layers):
        choice["sampled_intermediate_indices"] = [keep.intermediate_size.indices.tolist() for keep in layers]
        choice["sampled_query_group_indices"] = [keep.n_query_groups.indices.tolist() for keep in layers]
    return choice


if __name__ == "__main__":
    main()
