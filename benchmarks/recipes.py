"""Print the costs of the recipes in config_hub, or write them into their headers.

    python benchmarks/recipes.py [--write] [--no_plan] [config_hub/distill/pythia-6.9b/410m.yaml …]

Memory is the plan of `litgpt distill --dry_run` (`litgpt_whittle.training.memory_plan`), made on the CPU for the target
GPUs. Its student lies in the recipe's bin, with sizes as close as possible to those of a known model. The plan assumes
no compilation; a compiled student needs less. FLOPs are in closed form, and GPU-hours assume a share of the peak
(`costs.py`).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import cached_property, lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import litgpt.pretrain
import numpy as np
import torch
from costs import H100, UTILISATION, forward_flops, gpu_hours, training_flops
from jsonargparse import ArgumentParser, Namespace, capture_parser
from litgpt import GPT, Config
from litgpt.utils import CLI

from litgpt_whittle import SubNet
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.distillation.quantize import saved_bytes
from litgpt_whittle.metrics import BACKWARD
from litgpt_whittle.pipeline.extract_stage import REPAIR_PASSES
from litgpt_whittle.repair.costs import repair_bytes
from litgpt_whittle.spaces.bins import parse_bins
from litgpt_whittle.spaces.sizes import Sizes, decided
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.supergpt import SuperGPT, student_model
from litgpt_whittle.training.memory_plan import MemoryPlan, plan_memory
from litgpt_whittle.training.planned_step import Step, teacher_dtype

HUB = Path(__file__).parents[1] / "config_hub"
GIVEN = {name: ["TEACHER"] for name in ("search", "rank", "cache_teacher", "prune", "whittle")}
GIVEN["extract"] = ["TEACHER", "best.yaml"]
"""Positional arguments of each command"""

COMMANDS = ("search", "rank", "extract", "distill", "pretrain_supernet", "whittle")
"""Commands whose recipes state their costs"""

LIKE = {
    "llama-3.1-8b/1b": Config.from_name("Llama-3.2-1B"),
    "llama-3.1-8b/3b": Config.from_name("Llama-3.2-3B"),
    "qwen3-8b/0.6b": Config.from_name("Qwen3-0.6B"),
    "qwen3-8b/1.7b": Config.from_name("Qwen3-1.7B"),
    "olmo-2-7b/1b": Config(n_layer=16, n_embd=2048, n_head=16, intermediate_size=8192),
    "smollm2-1.7b/360m": Config.from_name("SmolLM2-360M"),
} | {
    f"{teacher}/{size}": Config.from_name(f"pythia-{size}")
    for teacher in ("pythia-6.9b", "pythia-12b")
    for size in ("410m", "1b", "2.8b")
}
"""Known model whose size a recipe targets"""


class Recipe:
    """A file of config_hub, parsed with its command.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.command = path.relative_to(HUB).parts[0]
        self.name = "/".join(path.relative_to(HUB).with_suffix("").parts[1:])
        parser = _parser(self.command)
        config = parser.parse_args([*GIVEN.get(self.command, []), f"--config={path}"])
        self.args: Namespace = parser.instantiate_classes(config)

    @property
    def header(self) -> str:
        """Return the comment at the start of the file."""
        lines = self.path.read_text().splitlines()
        n = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        return "\n".join(lines[:n])

    def twin(self, command: str) -> Recipe:
        """Return the recipe for another command that makes a student of the same size."""
        return open_recipe(HUB / command / f"{self.name.removesuffix('-chat')}.yaml")

    @cached_property
    def teacher(self) -> Config:
        """Return the config of the recipe's teacher."""
        if self.command == "distill":
            return Config.from_name(self.args.teacher_checkpoint_dir.name)
        if self.command == "pretrain_supernet":
            return Config.from_name(self.args.initial_checkpoint_dir.name)
        # other commands get a checkpoint on the command line
        return Config.from_name(re.search(rf"litgpt {self.command} \S+/(\S+)", self.header)[1])

    @cached_property
    def space(self) -> Space:
        """Return the search space of a recipe for `search` or `distill`."""
        if self.command == "distill":
            return self.twin("search").space
        args, (bin,) = self.args, parse_bins(self.args.bin)
        tied = bool(self.twin("distill").args.train.tie_embeddings)
        return Space(self.teacher, args.space, bin, tied, decided(args.search_space, self.teacher))

    @cached_property
    def student(self) -> SubNet:
        """Return a student of the recipe's size, as close to the known model as its space and bin allow."""
        if self.command == "distill":
            return self.twin("search").student
        space, like = self.space, LIKE[self.name]
        wished = vars(like) | {"heads_per_group": like.n_head // like.n_query_groups}
        layers = np.linspace(0, space.teacher.n_layer - 1, min(like.n_layer, space.teacher.n_layer)).round().astype(int)
        layers = tuple(layers.tolist())
        values = {key: wished[key[0]] for key in space.complete({}, layers)}
        return space.near(np.random.default_rng(0), Sizes(layers, values))

    def supernet_space(self) -> Space:
        """Return the sub-networks that a recipe for `pretrain_supernet` trains."""
        return self.args.supernet.make_sampler(self.teacher, bool(self.args.train.tie_embeddings)).space

    @property
    def n_devices(self) -> int:
        return self.args.devices * self.args.num_nodes

    def step(self) -> Step:
        """Return a training step on the recipe's GPUs."""
        args, rest = self.args, {}
        if self.command == "distill":
            student, teacher = self.student, self.teacher
            build = lambda: student_model(student)
            objective = args.distill.objectives()(0.0)
            rest = {
                "build_teacher": lambda: GPT(teacher),
                "quantized_bytes": saved_bytes(teacher, args.teacher_quantize, teacher_dtype(args.precision)),
                "teacher_is_sharded": args.teacher_placement == "sharded",
                "is_compiled": args.compile,
            }
        else:
            build = lambda: SuperGPT(self.teacher)
            objective = Objective()
        return Step.of(
            args.train,
            build,
            args.optimizer,
            args.precision,
            torch.device("cpu"),
            self.n_devices,
            args.strategy,
            args.train.max_seq_length,
            objective=objective,
            activation_checkpointing=args.activation_checkpointing,
            tie_embeddings=bool(args.train.tie_embeddings),
            is_elsewhere=True,
            **rest,
        )

    def flops(self) -> float:
        """Return the floating-point operations of the whole run."""
        args = self.args
        if self.command == "search":
            per_token = forward_flops(self.student, args.train.max_seq_length)
            return args.iterations * self.tokens * per_token
        if self.command == "rank":  # a pass with gradients, and one pass without each layer
            n_forward = (1 + BACKWARD) * args.tokens + self.teacher.n_layer * args.layer_tokens
            return n_forward * forward_flops(self.teacher, args.train.max_seq_length)
        if self.command == "extract":
            return (
                REPAIR_PASSES
                * args.repair.n_tokens(self.teacher)
                * forward_flops(self.teacher, args.train.max_seq_length)
            )
        if self.command == "whittle":  # the other stages are below a thousandth
            return self.twin("search").flops() + self.twin("distill").flops()
        length, again = args.train.max_seq_length, args.activation_checkpointing
        if self.command == "distill":
            return self.tokens * training_flops(self.student, length, self.teacher, again)
        # an upper bound: counts all networks of a step as the full one
        return self.tokens * N_NETWORKS * training_flops(self.teacher, length, None, again)

    @property
    def tokens(self) -> int:
        """Return the training tokens, or the tokens per candidate of a search."""
        args = self.args
        if self.command == "search":
            return args.eval.max_iters * args.train.micro_batch_size * args.train.max_seq_length
        return args.train.max_tokens

    def cost(self) -> str:
        """Return the header's line of costs."""
        n = self.flops()
        # a repair computes in fp32, and its solves are not counted
        peak, kind = (H100.fp32_peak, " in fp32") if self.command == "extract" else (H100.peak, "")
        hours = gpu_hours(n, peak)
        shown = f"{hours:,.0f}" if hours >= 10 else f"{hours:.{1 if hours >= 0.1 else 3}f}"
        limit = "at least " if self.command == "extract" else ""
        # racing drops candidates, and most networks of a super-network are smaller than the full one
        if self.command == "pretrain_supernet" or self.args.get("racing"):
            limit = "at most "
        share = f"{100 * UTILISATION:.0f} % of an {H100.name}'s {peak / 1e12:.0f} TFLOP/s"
        return f"# Cost: {limit}{shown} GPU-hours ({n:.1e} FLOPs{kind} at an assumed {share})."

    def memory(self, plan: Callable[[Step], MemoryPlan] = plan_memory) -> str:
        """Return the header's sentence on memory."""
        if self.command == "whittle":  # the other stages need less
            return self.twin("distill").memory(plan)
        if self.command in ("distill", "pretrain_supernet"):
            return f"Memory: {plan(self.step()).total / 1e9:.1f} GB per GPU."
        if self.command == "extract":
            searches = [open_recipe(path) for path in recipes("search") if path.parent.name == self.name]
            device = torch.device("cuda")
            n = max(repair_bytes(recipe.student, recipe.space.tied, device) for recipe in searches)
        else:
            n = 2 * sum(weight.numel() for weight in _meta(self.teacher).parameters())
        return f"Memory: {n / 1e9:.1f} GB and activations."

    def write(self, memory: str | None) -> None:
        """Write the costs into the header, and the memory if it is known."""
        lines = self.path.read_text().splitlines(keepends=True)
        for i, line in enumerate(lines):
            if line.startswith("# Hardware:") and memory is not None:
                before, _, after = line.partition("Memory:")
                lines[i] = f"{before}{memory} Tokens:{after.partition('Tokens:')[2]}"
            if line.startswith("# Cost:"):
                lines[i] = f"{self.cost()}\n"
        self.path.write_text("".join(lines))


N_NETWORKS = 4
"""Networks per step of the sandwich: the full one, the smallest, two random ones"""


@lru_cache
def open_recipe(path: Path) -> Recipe:
    """Return the recipe in a file; each is parsed once."""
    return Recipe(path)


@lru_cache
def _parser(command: str) -> ArgumentParser:
    """Return litgpt's command-line parser for a command."""
    points = {point.name: point for point in entry_points(group="litgpt.commands")}
    setup: Any = litgpt.pretrain.setup if command == "pretrain" else points[command].load()
    return capture_parser(lambda: CLI(setup, args=[]))


def _meta(config: Config) -> GPT:
    with torch.device("meta"):
        return GPT(config)


def recipes(*commands: str) -> list[Path]:
    """Return the recipe files of some or all commands, without the demo's."""
    found = sorted(path for path in HUB.rglob("*.yaml") if path.stem != "demo")
    return [path for path in found if not commands or path.relative_to(HUB).parts[0] in commands]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="*", help=f"by default all for {', '.join(COMMANDS)}")
    parser.add_argument("--write", action="store_true", help="write the figures into the headers")
    parser.add_argument("--no_plan", action="store_true", help="skip the memory plan, which takes most of the time")
    args = parser.parse_args()
    for path in args.paths or recipes(*COMMANDS):
        recipe = open_recipe(path.resolve())
        print(recipe.command, recipe.name, flush=True)
        if recipe.command in ("search", "distill"):
            student = recipe.student
            print(f"  student: {recipe.space.n_params(student):,} parameters, {len(student)} layers")
        is_planned = recipe.command in ("distill", "pretrain_supernet", "whittle")
        memory = None if args.no_plan and is_planned else recipe.memory()
        print(*(["  " + memory] if memory else []), "  " + recipe.cost()[2:], sep="\n", flush=True)
        if args.write:
            recipe.write(memory)


if __name__ == "__main__":
    main()
