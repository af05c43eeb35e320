"""Estimate the memory that training needs on each device, before anything is allocated.

The plan runs one training step (`litgpt_whittle.training.planned_step`) on tensors that have shapes but no data
(`FakeTensorMode`), and adds up the memory that they would take. It assumes:

- Compiled models take at most the memory of uncompiled ones. Compilers keep no tensor that uncompiled code frees, and
  where it costs little, they recompute activations in the backward pass instead of storing them.
- Compiled losses of logits take `N_COMPILED` tensors of a chunk's size in addition to the logits.
- GPUs that this machine lacks have a kernel that adds half-precision products to float32 sums, if the installed
  PyTorch supports it.
- All tokens of a mixture of experts go to the same experts, which is the worst case (`RoutesToFirst`).
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from litgpt_whittle.distillation.head_gradients import accumulates_products
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import readable_size
from litgpt_whittle.processes import free_memory
from litgpt_whittle.training.live_bytes import LiveBytes, n_bytes
from litgpt_whittle.training.planned_step import (
    PlannedTeacher,
    RoutesToFirst,
    Step,
    planned_student,
    pretended_devices,
    run_step,
)

LITTLE = 0.01
"""Planning is skipped if both models' weights, gradients and AdamW's state take less than this fraction of the free
memory"""


class NoPlan(UserError):
    """Raised if the memory of a training run cannot be planned."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory on each device in bytes, at the peak of a training step."""

    weights: int
    """Student weights held by the device"""
    gradients: int
    optimizer: int
    teacher: int
    step: int
    """Temporary memory within a step: activations, gathered weights, logits"""
    checkpoint: int = 0
    """CPU memory that the first process needs to assemble a checkpoint"""
    on_cpu: bool = False
    """True if training runs on the CPU, so that assembling a checkpoint adds to the device's memory"""

    @property
    def total(self) -> int:
        """Peak memory in bytes, without that of the Python interpreter and the device's driver."""
        saved = self.weights + self.optimizer + self.teacher + (self.checkpoint if self.on_cpu else 0)
        return max(self.weights + self.gradients + self.optimizer + self.teacher + self.step, saved)

    def __str__(self) -> str:
        rows = {
            "student's weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "teacher": self.teacher,
            "activations, logits": self.step,
            "at the peak": self.total,
            "checkpoint, on CPU": self.checkpoint,
        }
        lines = [f"  {name:<20}{readable_size(n_bytes):>12}" for name, n_bytes in rows.items() if n_bytes]
        return "\n".join(["Memory on each device:", *lines])


def show_plan(step: Step, placement: str, n_local: int) -> bool:
    """Print the memory that a training needs, and return whether the teacher must be sharded.

    See `choose_placement` for the arguments.
    """
    is_sharded, text = choose_placement(step, placement, n_local)
    if text:
        print(text)
    return is_sharded


def choose_placement(step: Step, placement: str, n_local: int, is_final: bool = False) -> tuple[bool, str]:
    """Return whether the teacher must be sharded over the devices, and a text that shows the planned memory.

    If memory is plentiful and `is_final` is false, planning is skipped and the text is empty.

    Args:
        step: A step of the training run.
        placement: Placement of the teacher: "replicated", "sharded", or "auto", which shards it only if it does not fit
            otherwise.
        n_local: Number of devices on this machine.
        is_final: True if the command ends after the plan, as with `--dry_run`.

    Raises:
        NoPlan: If planning fails, and `is_final` is true or the teacher's placement depends on the plan. Otherwise a
            failure only causes a warning.
    """
    placements = {"replicated": [False], "sharded": [True], "auto": [False, True]}[placement]
    if step.n_devices == 1 or step.build_teacher is None:
        placements = [False]
    free = free_memory(step.device, n_local)
    if not is_final and _weights_alone(step) < free * LITTLE:
        return placements[0], ""
    try:
        for is_sharded in placements:
            plan = plan_memory(replace(step, teacher_is_sharded=is_sharded))
            if plan.total <= free:
                break
    except UserError:
        raise
    except Exception as error:  # third-party optimizers and losses may fail on tensors without data
        what = "" if step.build_teacher is None else f" with a {'sharded' if is_sharded else 'replicated'} teacher"
        message = f"memory{what} cannot be planned, {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if is_final:
            raise NoPlan(f"{message}; leave --dry_run out") from None
        if len(placements) > 1:
            raise NoPlan(
                f"{message}; choose --teacher_placement replicated, the faster one, or sharded, which takes less memory"
            ) from None
        warnings.warn(message, stacklevel=2)
        return placements[0], ""
    lines = [str(plan)]
    if step.build_teacher is not None and step.n_devices > 1:
        lines.append(f"The teacher is {'sharded' if is_sharded else 'replicated'}")
    if plan.total > free:
        lines.append(
            f"That is more than the {readable_size(free)} that are free: use more devices, a smaller "
            "train.micro_batch_size, or --activation_checkpointing true"
        )
    return is_sharded, "\n".join(lines)


def _weights_alone(step: Step) -> int:
    """Return the unsharded fp32 bytes of weights, gradients and AdamW state, and of the teacher's weights."""
    with torch.device("meta"):
        student = sum(weight.numel() for weight in step.build_student().parameters())
        teacher = step.build_teacher and sum(weight.numel() for weight in step.build_teacher().parameters())
    return 4 * (4 * student + (teacher or 0))


def plan_memory(step: Step) -> MemoryPlan:
    """Return the memory plan of a step: run the step on tensors without data, with an optimizer that has its state.

    No process group may exist yet: if devices share a model, a fake one is created and destroyed in the end.

    Args:
        step: The step to run.
    """
    for dtype in (torch.bfloat16, torch.float16):
        accumulates_products(step.device_type, dtype)  # cached; its first call needs tensors with data
    shared = step.n_devices > 1 and (step.is_sharded or step.teacher_is_sharded)
    live = LiveBytes()
    devices = pretended_devices(step) if shared else nullcontext()
    without_content = FakeTensorMode(allow_non_fake_inputs=True)
    routing = RoutesToFirst()
    with torch.random.fork_rng(devices=[]), devices as mesh, without_content, live, routing, step.device:
        root = planned_student(step, mesh)
        routing.watch(root)
        weights = live.now
        teacher = None if step.build_teacher is None else PlannedTeacher(step, root, mesh)
        if teacher is not None:
            routing.watch(teacher.model)
        teacher_bytes = live.now - weights
        optimizer = step.build_optimizer(root.parameters())
        for weight in root.parameters():
            weight.grad = torch.empty_like(weight)
        optimizer.step()  # creates its state
        optimizer.zero_grad()
        live.peak = live.now
        gradients = run_step(step, root, teacher, optimizer)
        state = n_bytes(value for slots in optimizer.state.values() for value in slots.values())
        # DDP keeps a second copy of the gradients, in the buckets that it sends
        buckets = gradients if step.n_devices > 1 and not step.is_sharded else 0
        return MemoryPlan(
            weights=weights,
            gradients=gradients + buckets,
            optimizer=state,
            teacher=teacher_bytes - step.quantized_bytes,
            step=max(0, live.peak - weights - teacher_bytes - state - gradients),
            checkpoint=_checkpoint_bytes(weights, state, step),
            on_cpu=_is_on_cpu(step),
        )


def _checkpoint_bytes(weights: int, state: int, step: Step) -> int:
    """Return the CPU memory in bytes that saving a checkpoint takes.

    Args:
        weights: Bytes of the weights on each device.
        state: Bytes of the optimizer state on each device.
        step: The planned step.
    """
    if step.n_devices > 1 and step.is_sharded:
        return (weights + state) * step.n_devices
    return 0 if _is_on_cpu(step) else max(weights, state)  # copied from the device one file at a time


def _is_on_cpu(step: Step) -> bool:
    return step.device.type == "cpu" and not step.is_elsewhere
