"""Compare extracted models with the sub-networks that were scored, for this package and whittle on the same models.

    python benchmarks/extraction.py --whittle_python WHITTLE_ENVIRONMENT/bin/python

For random sub-networks of all four spaces, the logits inside the super-network are compared with those of the extracted
model, and the counted parameters with the parameters of the extracted model. whittle runs in its own process with its
own functions: `set_sub_network`, `compute_parameters`, `extract_current_sub_network`. search_throughput.py and
distill_throughput.py compare speed and memory.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from litgpt.config import Config
from search_memory import random_teacher
from search_throughput import whittle_choice

from litgpt_whittle import SubNet, extract_weights, n_params, student_model
from litgpt_whittle.spaces.bins import parse_bins
from litgpt_whittle.spaces.space import Space, SpaceName

SIZES = {"n_layer": 4, "n_embd": 64, "n_head": 8, "vocab_size": 512, "padded_vocab_size": 512, "block_size": 64}
MODELS = {
    "Pythia-shaped": ("pythia-14m", SIZES | {"intermediate_size": 256}),
    "Llama-shaped": ("Llama-3.2-1B", SIZES | {"n_query_groups": 4, "intermediate_size": 256, "head_size": 8}),
}
TOLERANCE = 1e-4

RIVAL = """
import json, sys
import torch
from whittle.metrics.parameters import compute_parameters
from whittle.models.gpt import GPT
from whittle.models.gpt.extract import extract_current_sub_network
from litgpt.config import Config

given = torch.load(sys.argv[1], weights_only=True)
config = Config.from_name(given["name"], **given["sizes"])
config.fix_head_size = True
model = GPT(config).eval()
model.load_state_dict(given["weights"])

def tried(choice):
    try:
        with torch.no_grad():
            model.set_sub_network(**choice)
            inside, counted = model(given["ids"]), compute_parameters(model)
            cut = extract_current_sub_network(model).eval()
            has = sum(p.numel() for p in cut.parameters())
            difference = float((cut(given["ids"]) - inside).abs().max())
            return {"difference": difference, "counted": counted, "has": has}
    except Exception as error:
        return {"error": type(error).__name__}

# of all ways to say the same, the one that goes best
found = [min(map(tried, ways), key=lambda result: result.get("difference", 1e9)) for ways in given["choices"]]
print("RESULT" + json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whittle_python", help="the Python of an environment that has whittle")
    parser.add_argument("--n", type=int, default=20, help="sub-networks per space")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'model':<15}{'space':<18}{'tool':<9}{'extracted as scored':>20}{'counted right':>15}   otherwise")
    for title, (name, sizes) in MODELS.items():
        config = Config.from_name(name, **sizes)
        model = random_teacher(config).eval()
        ids = torch.randint(config.vocab_size, (2, 16))
        for space in get_args(SpaceName):
            subnets = draw(config, space, args.n)
            report(title, space, "ours", ours(model, subnets, ids))
            if args.whittle_python:
                report(title, space, "whittle", theirs(args.whittle_python, name, sizes, model, subnets, ids))


def draw(config: Config, space: SpaceName, n: int) -> list[SubNet]:
    """Return random sub-networks of half the size."""
    (bin,) = parse_bins(f"{n_params(config, SubNet.full(config)) // 2}±20%")
    rng = np.random.default_rng(0)
    return [Space(config, space, bin).sample(rng) for _ in range(n)]


@torch.inference_mode()
def ours(model: torch.nn.Module, subnets: list[SubNet], ids: torch.Tensor) -> list[dict]:
    found = []
    for subnet in subnets:
        with model.running(subnet):
            inside = model(ids)
        cut = student_model(subnet).eval()
        cut.load_state_dict(extract_weights(model, subnet))
        difference = float((cut(ids) - inside).abs().max())
        has = sum(p.numel() for p in cut.parameters())
        found.append({"difference": difference, "counted": n_params(model.config, subnet), "has": has})
    return found


def theirs(
    python: str, name: str, sizes: dict, model: torch.nn.Module, subnets: list[SubNet], ids: torch.Tensor
) -> list[dict]:
    given = {"name": name, "sizes": sizes, "weights": model.state_dict(), "ids": ids}
    given["choices"] = [in_whittles_words(subnet) for subnet in subnets]
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "given.pt"
        torch.save(given, path)
        run = subprocess.run([python, "-c", RIVAL, str(path)], env=environment, capture_output=True, text=True)
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


def in_whittles_words(subnet: SubNet) -> list[dict]:
    """Return whittle's arguments for a sub-network: sizes per layer or once, with and without groups."""
    per_layer = whittle_choice(subnet)
    if subnet.n_layer.is_prefix:
        del per_layer["sampled_layer_indices"]
    once = dict(per_layer)
    for name in ("sub_network_intermediate_size", "sub_network_num_heads", "sub_network_query_groups"):
        if len(set(once[name])) == 1:
            once[name] = once[name][0]
    per_group = subnet.teacher.n_head // subnet.teacher.n_query_groups
    ways = [per_layer, once]
    if isinstance(once["sub_network_num_heads"], int):
        ways.append(once | {"sub_network_num_heads": once["sub_network_num_heads"] * per_group})
    return ways + [{k: v for k, v in way.items() if k != "sub_network_query_groups"} for way in ways]


def report(title: str, space: str, tool: str, found: list[dict]) -> None:
    """Print one line of the table."""
    n = len(found)
    same = sum(result.get("difference", float("inf")) < TOLERANCE for result in found)
    right = sum("has" in result and result["counted"] == result["has"] for result in found)
    errors = Counter(result["error"] for result in found if "error" in result)
    told = [f"{count} × {error}" for error, count in errors.items()]
    if wrong := [r["difference"] for r in found if r.get("difference", 0) >= TOLERANCE]:
        told.append(f"logits differ by up to {max(wrong):.2g}")
    if off := [abs(r["counted"] - r["has"]) / r["has"] for r in found if "has" in r and r["counted"] != r["has"]]:
        told.append(f"counts are off by up to {max(off):.1%}")
    print(f"{title:<15}{space:<18}{tool:<9}{f'{same}/{n}':>20}{f'{right}/{n}':>15}   {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
