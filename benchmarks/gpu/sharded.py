"""Measure distillation steps with FSDP2 on a process group of one device, and plan the memory for eight."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from bench import STUDENT, TEACHER, Bench
from litgpt.model import GPT
from torch.distributed.device_mesh import init_device_mesh
from training import train_settings

from litgpt_whittle import load_model
from litgpt_whittle.distillation.head import LossModel
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.memory_plan import plan_memory
from litgpt_whittle.training.planned_step import Step
from litgpt_whittle.training.sharding import gathered, shard_student
from litgpt_whittle.training.teacher import LiveTeacher

OBJECTIVE = Objective(0.2, 0.8, 0.9)
WAYS = (("plain", False, False), ("sharded", True, False), ("compiled", True, True))
"""Name, whether student and teacher are sharded, and whether the student is compiled"""


def fsdp(bench: Bench) -> Iterator[dict]:
    """Train a few steps without sharding, sharded, and sharded and compiled; the losses must be equal."""
    yield plan_for_eight(bench)
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        expected = None
        for name, is_sharded, is_compiled in WAYS:
            started = time.perf_counter()
            losses = train(bench, is_sharded, is_compiled)
            expected = expected or losses
            yield {
                f"{name}_s": time.perf_counter() - started,
                f"{name}_difference": max(abs(a / b - 1) for a, b in zip(losses, expected)),
            }
    finally:
        dist.destroy_process_group()


def plan_for_eight(bench: Bench) -> dict:
    """Return the memory plan of a step on eight devices, in GB."""
    settings = TrainArgs(**train_settings(bench) | {"global_batch_size": 8 * bench.rows})
    student, teacher = bench.config(STUDENT), bench.config(TEACHER)
    step = Step.of(
        settings,
        lambda: GPT(student),
        "AdamW",
        "bf16-mixed",
        bench.device,
        8,
        "fsdp",
        bench.length,
        objective=OBJECTIVE,
        build_teacher=lambda: GPT(teacher),
        is_compiled=True,
        is_elsewhere=bench.device.type == "cpu",
    )
    started = time.perf_counter()
    plan = plan_memory(step)
    parts = ("weights", "gradients", "optimizer", "teacher", "step", "total")
    found = {f"planned_{name}_gb": getattr(plan, name) / 1e9 for name in parts}
    return found | {"planning_s": time.perf_counter() - started}


def train(bench: Bench, is_sharded: bool, is_compiled: bool, n_steps: int = 3) -> list[float]:
    """Return the losses of the student's first steps with its teacher, in bf16-mixed."""
    mesh = init_device_mesh(bench.device.type, (1,), mesh_dim_names=("data_parallel",))
    student = load_model(bench.checkpoint(STUDENT), dtype=torch.float32).train()
    student.max_seq_length = bench.length
    root = LossModel(student)
    root.objective = OBJECTIVE
    root = shard_student(root, mesh["data_parallel"], "bf16-mixed") if is_sharded else root.to(bench.device)
    teacher = LiveTeacher(bench.checkpoint(TEACHER), bench.length, torch.bfloat16, bench.device, is_sharded)
    run = torch.compile(root) if is_compiled else root
    optimizer = torch.optim.AdamW(root.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(student.config.vocab_size, (2, bench.length + 1), generator=generator).to(bench.device)
    x, y, losses = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), []
    for _ in range(n_steps):
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = run(x, y, teacher(x)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(root.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert gathered(student.state_dict())["lm_head.weight"].shape == student.lm_head.weight.shape
    return losses
