"""Estimate the costs of a pipeline's stages, and measure the speed of this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from litgpt.model import GPT

from litgpt_whittle.distillation.cache import Layout
from litgpt_whittle.distillation.codecs import make_codec
from litgpt_whittle.distillation.head import LossModel
from litgpt_whittle.metrics import BACKWARD, flops
from litgpt_whittle.pipeline.costs import Cost, Speed
from litgpt_whittle.pipeline.stages import Stages
from litgpt_whittle.processes import n_devices, own_device
from litgpt_whittle.subnet import DROPS, FIELDS, SubNet
from litgpt_whittle.supergpt import student_model
from litgpt_whittle.tensors import weights_dtype
from litgpt_whittle.training.planned_step import AUTOCAST, teacher_dtype


def costs(stages: Stages) -> list[Cost]:
    """Return every stage's cost, for random students of the given sizes.

    A stage that may end early, such as a race or a search on little validation text, counts in full.
    """
    found = [cost for kind in stages.used if not kind.is_per_student for cost in kind.costs()]
    for student in stages.request.bins:
        found += [cost for kind in stages.used if kind.is_per_student for cost in kind.costs(student)]
    return found


def cache_bytes(stages: Stages) -> int:
    """Return the maximum size of the teacher cache on disk."""
    codec = make_codec(
        stages.cache_teacher.args.codec, stages.teacher.padded_vocab_size, stages.cache_teacher.args.temperature
    )
    n_windows = -(-(stages.cache_teacher.args.max_tokens or stages.distill.n_tokens) // stages.length)
    return n_windows * Layout(codec, stages.length).window_bytes


def measure_speed(stages: Stages, budget: float = 10.0) -> Speed:
    """Measure the speed of a teacher block's forward pass, and of a student block's forward and backward pass.

    The student block is one of the largest student. Whole models would take more time and memory, but a model of many
    such blocks has the same speed.

    Args:
        stages: The pipeline's stages.
        budget: Seconds to spend; at least one pass of each runs in any case.
    """
    device, length = own_device(), stages.length
    precision = stages.distill.args.used_precision
    # a few hundred tokens saturate a CPU, but not a GPU
    n_rows, n_tokens = (
        (1, min(length, 256)) if device.type == "cpu" else (stages.distill.args.train.micro_batch_size, length)
    )
    largest = max(stages.search.examples.values(), key=lambda subnet: flops(stages.teacher, subnet, length))
    ours, theirs = _one_block(largest), _one_block(SubNet.full(stages.teacher))
    ids = torch.randint(ours.teacher.vocab_size, (n_rows, n_tokens), device=device)
    training: float = (1 + BACKWARD) * flops(ours.teacher, ours, n_tokens) * ids.numel()
    training /= _seconds(_training_pass(ours, ids, precision), budget / 2, device)
    forward: float = flops(theirs.teacher, theirs, n_tokens) * ids.numel()
    forward /= _seconds(_forward_pass(theirs, ids, precision), budget / 2, device)
    # processes on a CPU share its cores, all of which the measurement has used already
    n = 1 if device.type == "cpu" else n_devices(stages.request.devices)
    return Speed(forward * n, training * n)


def _one_block(subnet: SubNet) -> SubNet:
    """Return the last layer of a sub-network, with a small vocabulary; it has experts if any layer has."""
    teacher = copy.copy(subnet.teacher)
    teacher.vocab_size = teacher.padded_vocab_size = min(1024, teacher.vocab_size)
    kept = {name: getattr(subnet, name) for name in FIELDS if name not in DROPS}
    kept = {name: value[-1] if isinstance(value, tuple) else value for name, value in kept.items()}
    return SubNet(teacher, **kept | {"n_layer": f"{subnet.layers[-1]}-{subnet.layers[-1]}"})


def _training_pass(subnet: SubNet, ids: torch.Tensor, precision: str) -> Callable[[], None]:
    autocast = torch.autocast(ids.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)
    student = LossModel(_model(subnet, ids, weights_dtype(precision)))

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
