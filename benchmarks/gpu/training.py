"""Measure speed and memory of distillation against `litgpt pretrain` and the teacher's forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import litgpt.pretrain
import torch
from bench import STUDENT, TEACHER, Bench, make_profiler
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from repairs import repaired_student
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_post_hook

from litgpt_whittle import SubNet, load_model
from litgpt_whittle import distill as run_distill
from litgpt_whittle.commands import cache_teacher
from litgpt_whittle.commands import distill as distill_command
from litgpt_whittle.metrics import BACKWARD, flops
from litgpt_whittle.training import memory_plan
from litgpt_whittle.training.planned_step import Step

NO_VALIDATION = {"interval": 10**6, "max_iters": 1, "initial_validation": False, "final_validation": False}


def distill(bench: Bench) -> Iterator[dict]:
    """Distil the student with its compiled model, in bf16-mixed, from the teacher that runs on every batch."""
    counters.clear()
    yield distilled(bench, compile=True)
    breaks = counters["graph_break"]
    yield {
        "graph_breaks": sum(breaks.values()),
        "graph_break_reasons": [reason.splitlines()[0][:100] for reason in list(breaks)[:4]],
        "graphs": counters["stats"]["unique_graphs"],
    }


def distill_eager(bench: Bench) -> Iterator[dict]:
    """Distil without the compiler, with the profile of one optimizer step."""
    yield distilled(bench, is_profiled=True)


def distill_bf16_true(bench: Bench) -> Iterator[dict]:
    """Distil with weights and optimizer state in bf16."""
    yield distilled(bench, compile=True, precision="bf16-true")


def distill_repaired(bench: Bench) -> Iterator[dict]:
    """Distil a student whose sizes are those that a search proposes."""
    yield distilled(bench, student=repaired_student(bench, bench.size(16_384, 512)).folder)


def distill_cached(bench: Bench) -> Iterator[dict]:
    """Cache the teacher's predictions, then distil from them."""
    folder, n = bench.folder("cache"), n_tokens(bench)
    started = time.perf_counter()
    windows = cache_teacher.WindowArgs(bench.rows, bench.length)
    cache_teacher.setup(bench.checkpoint(TEACHER), bench.tokens(n), folder, train=windows)
    cached = bench.tokens(n).n_windows * bench.length
    yield {"cached_tokens": cached, "cached_tokens_per_s": round(cached / (time.perf_counter() - started))}
    yield distilled(bench, teacher_cache=folder)


def pretrain(bench: Bench) -> Iterator[dict]:
    """Run stock `litgpt pretrain` with the student's architecture; it always compiles."""
    settings = train_settings(bench)
    with patch.object(litgpt.pretrain, "save_checkpoint"):  # exclude the time of writing files
        clock = StepClock(bench)
        litgpt.pretrain.setup(
            STUDENT,
            model_config=bench.config(STUDENT),
            out_dir=bench.folder("pretrain"),
            precision="bf16-mixed",
            data=bench.tokens(n_tokens(bench)),
            train=TrainArgs(**settings),
            eval=EvalArgs(**NO_VALIDATION),
            devices=1,
            logger_name="csv",
        )
    yield clock.figures() | {"peak_gb": bench.peak_gb()}
    yield {"of_peak": bench.of_peak(training_flops(bench, bench.config(STUDENT)), clock.seconds())}


def teacher(bench: Bench) -> Iterator[dict]:
    """Run the teacher forward on a batch, logits included, as it is and compiled."""
    config = bench.config(TEACHER)
    model = load_model(bench.checkpoint(TEACHER), dtype=torch.bfloat16, device=bench.device).requires_grad_(False)
    model.max_seq_length = bench.length
    ids = torch.randint(config.vocab_size, (bench.rows, bench.length), device=bench.device)
    for name, run in (("eager", model), ("compiled", torch.compile(model))):
        with torch.no_grad():
            seconds = bench.seconds(lambda run=run: run(ids), 5, 2)
        of_peak = bench.of_peak(forward_flops(bench, config) * ids.numel(), seconds)
        yield {f"{name}_s": seconds, f"{name}_of_peak": of_peak}


def distilled(
    bench: Bench,
    compile: bool = False,
    precision: str = "bf16-mixed",
    student: Path | None = None,
    teacher_cache: Path | None = None,
    is_profiled: bool = False,
) -> dict[str, Any]:
    """Run `litgpt distill`, and return its speed, its peak memory and the planned one.

    Args:
        bench: The sizes.
        compile: If true, compile the student.
        precision: Fabric's name of the precision.
        student: Checkpoint of the student; by default the one with stock sizes.
        teacher_cache: A cache to learn from instead of the teacher.
        is_profiled: If true, profile one optimizer step.
    """
    student, plans = student or bench.checkpoint(STUDENT), []
    clock = StepClock(bench, is_profiled)
    source = {"teacher": bench.checkpoint(TEACHER)} if teacher_cache is None else {"teacher_cache": teacher_cache}
    plan_memory = memory_plan.plan_memory

    def noted(step: Step) -> memory_plan.MemoryPlan:
        plans.append(plan_memory(step))
        clock.forget()  # the plan's own optimizer steps
        return plans[-1]

    bench.forget_peak()
    with (
        patch.object(distill_command, "Saver", return_value=lambda *_: None),  # exclude the time of writing files
        patch.object(memory_plan, "plan_memory", noted),
        patch.object(memory_plan, "LITTLE", 0.0),  # toy sizes are planned as well
    ):
        run_distill(
            student,
            data=bench.tokens(n_tokens(bench)),
            out_dir=bench.folder("distill"),
            train=train_settings(bench),
            eval=NO_VALIDATION,
            precision=precision,
            compile=compile,
            logger_name="csv",
            **source,
        )
    config = Config.from_file(student / "model_config.yaml")
    frozen = [bench.config(TEACHER)] if teacher_cache is None else []
    found = clock.figures() | {
        "of_peak": bench.of_peak(training_flops(bench, config, frozen), clock.seconds()),
        "peak_gb": bench.peak_gb(),
        "planned_gb": plans[0].total / 1e9 if plans else None,
    }
    if bench.device.type == "cuda":
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        if plans:  # on a CPU, a process's memory includes more than tensors
            found["planned_over_peak"] = plans[0].total / torch.cuda.max_memory_allocated()
    return found


def train_settings(bench: Bench) -> dict[str, Any]:
    """Return the section `train`: one batch per step, and a line in the log for each."""
    return {
        "save_interval": None,
        "log_interval": 1,
        "global_batch_size": bench.rows,
        "micro_batch_size": bench.rows,
        "max_tokens": n_tokens(bench),
        "max_norm": 1.0,
        "min_lr": 1e-5,
        "lr_warmup_steps": 2,
        "max_seq_length": bench.length,
        "tie_embeddings": False,
    }


def n_tokens(bench: Bench) -> int:
    """Return the number of tokens of a training run."""
    return bench.size(14, 6) * bench.rows * bench.length


def training_flops(bench: Bench, trained: Config, frozen: Sequence[Config] = ()) -> int:
    """Return the FLOPs of a step: forward and backward of a model, forward of the frozen ones."""
    per_token = (1 + BACKWARD) * forward_flops(bench, trained) + sum(forward_flops(bench, config) for config in frozen)
    return per_token * bench.rows * bench.length


def forward_flops(bench: Bench, config: Config) -> int:
    """Return the FLOPs per token of a model's forward pass."""
    return flops(config, SubNet.full(config), bench.length)


class StepClock:
    """Clock of this process's optimizer steps for any training loop; can profile one of them.

    Args:
        bench: The sizes.
        is_profiled: If true, profile the last but one step.
    """

    def __init__(self, bench: Bench, is_profiled: bool = False) -> None:
        self.bench, self.moments, self.busy = bench, [time.perf_counter()], None
        self.profiler = make_profiler(bench.device) if is_profiled else None
        self.hook = register_optimizer_step_post_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.moments.append(time.perf_counter())
        n_done, n_steps = len(self.moments) - 1, n_tokens(self.bench) // (self.bench.rows * self.bench.length)
        if self.profiler is not None and n_done == n_steps - 2:
            self.bench.synchronize()
            self.moments[-1] = time.perf_counter()
            self.profiler.start()
        elif self.profiler is not None and n_done == n_steps - 1:
            self.bench.synchronize()
            seconds = time.perf_counter() - self.moments[-2]
            self.profiler.stop()
            self.busy = self.bench.write_profile(self.profiler, "Training: one optimizer step", seconds)

    def forget(self) -> None:
        """Forget the steps so far."""
        del self.moments[1:]

    def seconds(self) -> float:
        """Return the median seconds between the later steps; the first ones compile and warm up."""
        times = [after - before for before, after in zip(self.moments[1:], self.moments[2:])]
        return statistics.median(times[len(times) // 2 :])

    def figures(self) -> dict[str, Any]:
        """Return the step's time and tokens per second, and the seconds before the second step."""
        self.hook.remove()
        found = {
            "step_s": self.seconds(),
            "tokens_per_s": round(self.bench.rows * self.bench.length / self.seconds()),
            "until_first_step_s": self.moments[1] - self.moments[0],
        }
        return found if self.busy is None else found | {"busy": self.busy}
