"""Estimate costs on many GPUs: formulas against published runs, then 12B and 70B teachers on 100B tokens.

    python benchmarks/scale.py [--plan]

FLOPs and traffic are in closed form (`costs.py`); with --plan, memory is planned as in `litgpt distill --dry_run`,
which takes minutes. Nothing here is measured; published figures name their source.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
from costs import A100, H100, UTILISATION, gpu_hours, traffic, training_flops
from litgpt import GPT, Config

from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.memory_plan import plan_memory
from litgpt_whittle.training.planned_step import Step

PILE = 299_892_736_000
"""Training tokens of every Pythia model"""

PUBLISHED = [  # model, sequence length, tokens, A100 hours, source
    ("pythia-410m", 2048, PILE, 2_540, "arXiv 2304.01373"),
    ("pythia-1b", 2048, PILE, 4_830, "arXiv 2304.01373"),
    ("pythia-2.8b", 2048, PILE, 14_240, "arXiv 2304.01373"),
    ("pythia-6.9b", 2048, PILE, 33_500, "arXiv 2304.01373"),
    ("pythia-12b", 2048, PILE, 72_300, "arXiv 2304.01373"),
    ("tiny-llama-1.1b", 2048, 300_000_000_000, 3_456, "github.com/jzhang38/TinyLlama"),
]

MEMORY = [  # model, precision, GPUs, samples per step and per GPU, length, checkpointing, published memory, source
    ("tiny-llama-1.1b", "bf16-true", 1, 32, 4, 512, False, "14.10", "litgpt, tiny-llama/full.yaml"),
    ("gemma-2b", "bf16-true", 4, 16, 1, 512, True, "17.43", "litgpt, gemma-2b/full.yaml"),
    ("stablelm-base-alpha-3b", "bf16-true", 2, 8, 1, 512, True, "21.23", "litgpt, stablelm-base-alpha-3b/full.yaml"),
    ("tiny-llama-1.1b", "bf16-mixed", 16, 1024, 8, 2048, False, "at most 40", "TinyLlama, with fused kernels"),
]
"""Full training without a teacher; litgpt's finetuning shards by FSDP on several GPUs"""

TOKENS = 100_000_000_000
BATCH = 2**22
"""Tokens per step, large enough to keep 64 GPUs busy"""

NETWORKS = {"8 × 400 Gbit/s": 400e9, "100 Gbit/s": 12.5e9}
"""Bytes per second into a machine; its 8 GPUs forward what any of them receives"""


@dataclass
class Run:
    """A distillation."""

    title: str
    teacher: Config
    student: Config
    seq_length: int
    micro_batch_size: int
    is_sharded: bool
    """True if the teacher is sharded"""
    activation_checkpointing: bool = False

    def n_accumulated(self, n: int) -> int:
        return BATCH // self.seq_length // (n * self.micro_batch_size)

    def flops(self) -> float:
        """Return FLOPs per token."""
        return training_flops(self.student, self.seq_length, self.teacher, self.activation_checkpointing)

    def seconds(self) -> float:
        """Return the seconds to compute a micro-batch on one GPU."""
        return self.flops() * self.micro_batch_size * self.seq_length / (H100.peak * UTILISATION)

    def traffic(self, n: int) -> float:
        teacher = self.teacher if self.is_sharded else None
        return traffic(self.student, n, "fsdp", self.n_accumulated(n), teacher)

    def memory(self, n: int) -> float:
        """Return the memory in GB per GPU."""
        samples = BATCH // self.seq_length
        return planned(
            self.student,
            TrainArgs(global_batch_size=samples, micro_batch_size=self.micro_batch_size, max_norm=1.0),
            n,
            self.seq_length,
            Objective(0.2, 0.8, 0.9),
            build_teacher=lambda: GPT(self.teacher),
            teacher_is_sharded=self.is_sharded,
            activation_checkpointing=self.activation_checkpointing,
            is_compiled=True,
        )


def planned(
    config: Config,
    train: TrainArgs,
    n: int,
    seq_length: int,
    objective: Objective,
    precision: str = "bf16-mixed",
    **more: Any,
) -> float:
    """Return the planned memory of training on n GPUs, in GB per GPU."""
    strategy = "fsdp" if n > 1 else "auto"
    step = Step.of(
        train,
        lambda: GPT(config),
        "AdamW",
        precision,
        torch.device("cpu"),
        n,
        strategy,
        seq_length,
        objective=objective,
        is_elsewhere=True,
        **more,
    )
    return plan_memory(step).total / 1e9


def with_vocabulary_of(teacher: Config, name: str) -> Config:
    return replace(Config.from_name(name), padded_vocab_size=teacher.padded_vocab_size)


PYTHIA, LLAMA, LARGE = (Config.from_name(name) for name in ("pythia-12b", "Llama-3.1-8B", "Llama-3.1-70B"))
RUNS = [
    Run("Pythia-12B → 2.8B", PYTHIA, with_vocabulary_of(PYTHIA, "pythia-2.8b"), 2048, 4, False),
    Run("Llama-3.1-8B → 3B", LLAMA, with_vocabulary_of(LLAMA, "Llama-3.2-3B"), 4096, 1, False),
    Run("Llama-3.1-70B → 8B", LARGE, LLAMA, 4096, 2, True, activation_checkpointing=True),
]


def print_table(rows: list[tuple]) -> None:
    print("\n".join("| " + " | ".join(map(str, row)) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true")
    args = parser.parse_args()

    rows = [
        ("run", "A100 hours, published", f"computed at {100 * UTILISATION:.0f} % of the peak", "of the peak, reached")
    ]
    for name, length, tokens, hours, _ in PUBLISHED:
        n_flops = tokens * training_flops(Config.from_name(name), length)
        computed = gpu_hours(n_flops, A100.peak)
        rows.append((name, f"{hours:,}", f"{computed:,.0f}", f"{UTILISATION * computed / hours:.2f}"))
    print_table(rows)

    if args.plan:
        rows = [("run", "precision", "GPUs", "tokens per GPU", "GB per GPU, published", "planned", "where")]
        for name, precision, n, samples, micro_batch_size, length, is_checkpointed, found, where in MEMORY:
            train = TrainArgs(global_batch_size=samples, micro_batch_size=micro_batch_size, max_norm=None)
            more = {"precision": precision, "activation_checkpointing": is_checkpointed}
            memory = planned(Config.from_name(name), train, n, length, Objective(1.0, 0.0), **more)
            rows.append((name, precision, n, f"{micro_batch_size} × {length}", found, f"{memory:.2f}", where))
        print()
        print_table(rows)

    rows = [("run", "GPUs", "GPU-hours", "days", "GB per GPU", "GB received per micro-batch", "s computing it")]
    rows[0] += tuple(f"s receiving it, {name}" for name in NETWORKS)
    for run in RUNS:
        hours = gpu_hours(TOKENS * run.flops())
        for n in (8, 16, 32, 64):
            memory = f"{run.memory(n):.1f}" if args.plan and n in (8, 64) else ""
            n_bytes = run.traffic(n)
            # inside a machine, traffic uses NVLink
            times = [f"{n_bytes / speed:.2f}" if n > 8 else "" for speed in NETWORKS.values()]
            cells = (f"{hours:,.0f}", f"{hours / n / 24:.1f}", memory, f"{n_bytes / 1e9:.1f}", f"{run.seconds():.2f}")
            rows.append((run.title, n, *cells, *times))
    print()
    print_table(rows)


if __name__ == "__main__":
    main()
