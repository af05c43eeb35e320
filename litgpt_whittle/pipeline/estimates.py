"""Estimate tokens, floating-point operations, memory and time of a pipeline's stages on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from litgpt.model import GPT

from litgpt_whittle.commands.cache_teacher import CacheTeacherConfig
from litgpt_whittle.commands.distill import DistillConfig
from litgpt_whittle.commands.rank import RankConfig
from litgpt_whittle.commands.search import SearchConfig
from litgpt_whittle.distillation.cache import Layout
from litgpt_whittle.distillation.codecs import make_codec
from litgpt_whittle.distillation.head import LossModel
from litgpt_whittle.files import readable_size
from litgpt_whittle.fitness.perplexity import RepairedPerplexity
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.metrics import BACKWARD, flops
from litgpt_whittle.pipeline.stages import Stages
from litgpt_whittle.processes import n_devices as n_devices_of
from litgpt_whittle.processes import own_device
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.repair.costs import (
    candidate_bytes,
    collecting_flops,
    largest_block,
    moments_bytes,
    repair_bytes,
    solving_flops,
)
from litgpt_whittle.searching.selection import Rung
from litgpt_whittle.subnet import FIELDS, SubNet
from litgpt_whittle.supergpt import student_model
from litgpt_whittle.training.memory_plan import AUTOCAST, WEIGHTS_DTYPE, teacher_dtype

REPAIR_PASSES = 3
"""Upper bound of a repair's cost, in forward passes of the teacher over its tokens; see benchmarks/repair.py"""


_RunsTeacher: TypeAlias = RankConfig | SearchConfig | CacheTeacherConfig | DistillConfig


@dataclass(frozen=True)
class Cost:
    """Upper bound of a stage's cost."""

    name: str
    tokens: int
    forward: float
    """FLOPs of forward passes without gradients"""
    training: float = 0.0
    """FLOPs of forward and backward passes with gradients"""
    weights: int = 0
    """Bytes of models and moments on each device, without activations, gradients and the optimizer"""

    def seconds(self, speed: Speed) -> float:
        """Return the stage's time in seconds at a machine's speed."""
        return self.forward / speed.forward + self.training / speed.training


@dataclass(frozen=True)
class Speed:
    """Speed of all devices of this machine together, in FLOPs per second."""

    forward: float
    training: float


def costs(stages: Stages) -> list[Cost]:
    """Return every stage's cost, for random students of the given sizes.

    A stage that may end early, such as a race or a search on little validation text, counts in full.
    """
    request, length = stages.request, stages.length
    whole = flops(stages.teacher, SubNet.full(stages.teacher), length)
    parts = {name: flops(stages.teacher, subnet, length) for name, subnet in stages.examples.items()}
    held = _Held(stages)
    found = []
    if stages.ranks:
        args = stages.ranked
        n_layer_passes = stages.teacher.n_layer * args.layer_tokens
        training = (1 + BACKWARD) * args.tokens * whole
        tokens, weights = args.tokens + n_layer_passes, held.teacher(args)
        found.append(Cost("rank", tokens, n_layer_passes * whole, training, weights))
    found.append(_search_cost(stages, whole, list(parts.values()), length, held))
    n_tokens = stages.n_tokens
    if stages.caches:
        n_cached = stages.cached.max_tokens or n_tokens
        weights = held.teacher(stages.cached)
        found.append(Cost("cache_teacher", n_cached, n_cached * whole, weights=weights))
    taught = stages.trained.distill.uses_teacher and not stages.caches
    for name in request.bins:
        repair = stages.extracted.repair_args if stages.extracted.repair else None
        n_calibration = repair.n_tokens(stages.examples[name].config) if repair else 0
        forward = REPAIR_PASSES * n_calibration * whole
        refining = (1 + BACKWARD) * repair.refine_passes * n_calibration * parts[name] if repair else 0.0
        found.append(Cost(f"{name}/start", n_calibration, forward, refining, held.start(name, repair)))
        # activation checkpointing runs each block forward twice
        training = (1 + BACKWARD + stages.trained.activation_checkpointing) * n_tokens * parts[name]
        alone = held.student(name)
        beside = held.teacher_beside if taught else 0
        found.append(Cost(f"{name}/distilled", n_tokens, n_tokens * whole * taught, training, alone + beside))
        if request.has_baseline:
            found.append(Cost(f"{name}/baseline", n_tokens, 0.0, training, alone))
    return found


class _Held:
    """Bytes of weights on each device, by stage."""

    def __init__(self, stages: Stages) -> None:
        self.stages, full = stages, SubNet.full(stages.teacher)
        self.tied = stages.tied
        self.n_teacher = n_params(stages.teacher, full, self.tied)

    def teacher(self, args: _RunsTeacher, dtype: torch.dtype | None = None) -> int:
        """Return the teacher's bytes in a stage with these arguments, by default in the stage's precision."""
        is_sharded = not isinstance(args, RankConfig) and args.teacher_placement == "sharded"
        n_shards = n_devices_of(args.devices) if is_sharded and not isinstance(args, RankConfig) else 1
        return self.n_teacher * (dtype or _weights_dtype(args.precision)).itemsize // n_shards

    @property
    def teacher_beside(self) -> int:
        """Bytes of the teacher that runs while a student is trained."""
        trained = self.stages.trained
        return self.teacher(trained, teacher_dtype(trained.precision or _default_precision()))

    def start(self, name: str, repair: RepairArgs | None) -> int:
        """Return the bytes for extracting (and repairing) a student, one block of the teacher at a time."""
        subnet = self.stages.examples[name]
        if not repair:
            return largest_block(subnet.teacher)
        return repair_bytes(subnet, self.tied, own_device(), repair.refine_passes > 0)

    def student(self, name: str) -> int:
        """Return a student's bytes in training, before sharding."""
        n = n_params(self.stages.teacher, self.stages.examples[name], self.tied)
        return n * _weights_dtype(self.stages.trained.precision).itemsize


def _default_precision() -> str:
    return "bf16-true" if torch.cuda.is_available() else "32-true"


def _weights_dtype(precision: str | None) -> torch.dtype:
    return WEIGHTS_DTYPE.get(precision or _default_precision(), torch.float32)


def _search_cost(stages: Stages, whole: int, parts: list[int], length: int, held: _Held) -> Cost:
    args = stages.searched
    n_each = args.eval.max_iters * args.train.micro_batch_size * (args.train.max_seq_length or length)
    # measured sub-networks are the teacher with small cuts
    tokens = n_each * (args.iterations * len(parts) + stages.n_measurements)
    forward: float = n_each * (args.iterations * sum(parts) + stages.n_measurements * whole)
    training = 0.0
    for rung in map(Rung.parse, args.selection.rungs):
        tokens += rung.n * rung.tokens * len(parts)
        forward += rung.n * rung.tokens * whole * len(parts)
        training += (1 + BACKWARD) * rung.n * rung.tokens * sum(parts)
    weights, measure = held.teacher(args), args.measure
    n_calibration = measure.n_calibration
    tokens += n_calibration
    forward += n_calibration * whole
    if issubclass(measure, RepairedPerplexity):
        solves = sum(solving_flops(subnet, held.tied) for subnet in stages.examples.values())
        solves_measured = stages.n_measurements * solving_flops(SubNet.full(stages.teacher), held.tied)
        forward += collecting_flops(stages.teacher, n_calibration) + args.iterations * solves + solves_measured
        n_distinct, device = min(n_calibration, stages.teacher.vocab_size), own_device()
        weights += moments_bytes(stages.teacher, n_distinct, device) + candidate_bytes(stages.teacher, device)
    return Cost("search", tokens, forward, training, weights)


def cache_bytes(stages: Stages) -> int:
    """Return the maximum size of the teacher cache on disk."""
    codec = make_codec(stages.cached.codec, stages.teacher.padded_vocab_size, stages.cached.temperature)
    n_windows = -(-(stages.cached.max_tokens or stages.n_tokens) // stages.length)
    return n_windows * Layout(codec, stages.length).window_bytes


def measure_speed(stages: Stages, budget: float = 10.0) -> Speed:
    """Time a block of the teacher forward, and one of the largest student forward and backward, a few times each.

    Whole models would take more time and memory, and more blocks of the same kind have the same speed.

    Args:
        stages: The pipeline's stages.
        budget: Seconds to spend; at least one pass of each runs in any case.
    """
    device, length = own_device(), stages.length
    precision = stages.trained.precision or _default_precision()
    # a few hundred tokens saturate a CPU, but not a GPU
    n_rows, n_tokens = (
        (1, min(length, 256)) if device.type == "cpu" else (stages.trained.train.micro_batch_size, length)
    )
    largest = max(stages.examples.values(), key=lambda subnet: flops(stages.teacher, subnet, length))
    ours, theirs = _one_block(largest), _one_block(SubNet.full(stages.teacher))
    ids = torch.randint(ours.teacher.vocab_size, (n_rows, n_tokens), device=device)
    training: float = (1 + BACKWARD) * flops(ours.teacher, ours, n_tokens) * ids.numel()
    training /= _seconds(_training_pass(ours, ids, precision), budget / 2, device)
    forward: float = flops(theirs.teacher, theirs, n_tokens) * ids.numel()
    forward /= _seconds(_forward_pass(theirs, ids, precision), budget / 2, device)
    # processes on a CPU share its cores, all of which the measurement has used already
    n_devices = 1 if device.type == "cpu" else n_devices_of(stages.request.devices)
    return Speed(forward * n_devices, training * n_devices)


def _one_block(subnet: SubNet) -> SubNet:
    """Return the last layer of a sub-network, with a small vocabulary; it has experts if any layer has."""
    teacher = copy.copy(subnet.teacher)
    teacher.vocab_size = teacher.padded_vocab_size = min(1024, teacher.vocab_size)
    kept = {name: getattr(subnet, name) for name in FIELDS}
    kept = {name: value[-1] if isinstance(value, tuple) else value for name, value in kept.items()}
    return SubNet(teacher, **kept | {"n_layer": f"{subnet.layers[-1]}-{subnet.layers[-1]}"})


def _training_pass(subnet: SubNet, ids: torch.Tensor, precision: str) -> Callable[[], None]:
    autocast = torch.autocast(ids.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)
    student = LossModel(_model(subnet, ids, _weights_dtype(precision)))

    def run() -> None:
        with autocast:
            loss = student(ids, ids).loss
        loss.backward()
        student.zero_grad()

    return run


def _forward_pass(subnet: SubNet, ids: torch.Tensor, precision: str) -> Callable[[], None]:
    teacher = _model(subnet, ids, teacher_dtype(precision))
    return torch.no_grad()(lambda: teacher(ids))


def _model(subnet: SubNet, ids: torch.Tensor, dtype: torch.dtype) -> GPT:
    with ids.device:
        model = student_model(subnet).to(dtype)
    model.max_seq_length = ids.shape[1]
    return model


def _seconds(run: Callable[[], None], budget: float, device: torch.device) -> float:
    """Return the shortest time of several runs; the first one is the warm-up if there is time for a second."""
    times: list[float] = []
    while not times or (sum(times) + times[-1] < budget and len(times) < 6):
        started = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def cost_table(found: list[Cost], speed: Speed) -> list[list[str]]:
    """Return the stages' costs as a table, headings first."""
    rows = [["stage", "tokens", "FLOPs", "weights per device", "about"]]
    for cost in found:
        flop, weights = cost.forward + cost.training, readable_size(cost.weights)
        rows.append([cost.name, f"{cost.tokens:,}", f"{flop:.2g}", weights, duration(cost.seconds(speed))])
    total = sum(cost.seconds(speed) for cost in found)
    flop = sum(cost.forward + cost.training for cost in found)
    largest = readable_size(max(cost.weights for cost in found))
    return [*rows, ["all", f"{sum(cost.tokens for cost in found):,}", f"{flop:.2g}", largest, duration(total)]]


def duration(seconds: float) -> str:
    """Format seconds in a readable unit."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
