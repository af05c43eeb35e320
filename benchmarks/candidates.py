"""Measure how fast candidates of a bin are built, and which sizes they cover: Pythia-6.9B, fine layer-wise, ±1 %.

    python benchmarks/candidates.py            # 10,000 candidates, a few minutes on one core
    python benchmarks/candidates.py --n 500 --name Llama-3.1-8B --bin 1B±1%

No model is built: doing so would end this script with an error.
"""

import argparse
import time

import numpy as np
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle.index_plan import n_params
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.space import Space


def forbid_models() -> None:
    def refuse(self: GPT, *_: object) -> None:
        raise AssertionError("a model was built")

    GPT.__init__ = refuse


def describe(name: str, values: list[int], lo: int, hi: int) -> None:
    """Print range, quartiles and the share of possible values that occur."""
    quartiles = ", ".join(f"{q:,.0f}" for q in np.percentile(values, [25, 50, 75]))
    seen = len(set(values)) / (hi - lo + 1)
    span = f"{min(values):>6,} … {max(values):>6,} of {lo:,} … {hi:,}"
    print(f"  {name:<32} {span}   quartiles {quartiles}   {seen:.0%} of values")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="candidates to build")
    parser.add_argument("--name", default="pythia-6.9b", help="a litgpt config")
    parser.add_argument("--bin", default="410M±1%")
    parser.add_argument("--space", default="fine_layerwise")
    args = parser.parse_args()

    forbid_models()
    teacher = Config.from_name(args.name)
    started = time.perf_counter()
    space = Space(teacher, args.space, Bin.parse(args.bin))
    print(f"{args.name}, {args.space}, bin {space.bin}: set up in {time.perf_counter() - started:.2f} s")

    n = max(args.n // 3, 1)
    seconds = {}
    all_sizes: list = []
    parents: list = []
    for kind, make in {
        "sampled": space.sample,
        "mutated": lambda rng: space.mutate(rng, parents[rng.integers(len(parents))], 0.1),
        "crossed": lambda rng: space.crossover(rng, *(parents[i] for i in rng.integers(len(parents), size=2))),
    }.items():
        seconds[kind] = 0.0
        for i in range(args.n - 2 * n if kind == "sampled" else n):
            started = time.perf_counter()
            candidate = make(np.random.default_rng((len(seconds), i)))
            seconds[kind] += time.perf_counter() - started
            assert n_params(teacher, candidate) in space.bin
            if kind == "sampled":
                parents = [*parents[-49:], candidate]
                all_sizes.append(candidate)
        print(f"{kind}: {seconds[kind] / (i + 1) * 1000:.1f} ms per candidate, all {i + 1:,} in the bin")
    print(f"{args.n:,} candidates in {sum(seconds.values()):.0f} s; no model was built")

    print("sampled sizes:")
    layers = [(s, i) for s in all_sizes for i in range(len(s))]
    sizes = [s.layer(i) for s, i in layers]
    describe("layers", [len(s) for s in all_sizes], 1, teacher.n_layer)
    describe("which layers", [layer for s in all_sizes for layer in s.layers], 0, teacher.n_layer - 1)
    describe("n_embd", [len(s.n_embd) for s in all_sizes], 1, teacher.n_embd)
    describe("n_query_groups, per layer", [len(k.n_query_groups) for k in sizes], 1, teacher.n_query_groups)
    describe("intermediate_size, per layer", [len(k.intermediate_size) for k in sizes], 1, teacher.intermediate_size)


if __name__ == "__main__":
    main()
