"""Estimate the memory that training needs on each device, before anything is allocated.

The plan runs one training step, with sharding, optimizer and teacher, on tensors that have shapes but no data
(`FakeTensorMode`), and adds up the memory that they would take. The memory of a mixture of experts depends on the
router's choices, for which the plan assumes the worst case (`RoutesToFirst`).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from litgpt.model import GPT, LLaMAMoE
from litgpt.utils import instantiate_torch_optimizer
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litgpt_whittle.distillation.head import (
    CHUNK_ELEMENTS,
    PART_ELEMENTS,
    LossModel,
    SoftTargets,
    TeacherLogits,
    accumulates_products,
    hidden_states,
)
from litgpt_whittle.distillation.hidden import HiddenLoss, Watch
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import readable_size
from litgpt_whittle.processes import free_memory
from litgpt_whittle.supergpt import tie
from litgpt_whittle.tensors import weights_dtype
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.sharding import checkpoint_activations, shard_frozen, shard_student

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

LITTLE = 0.01
"""Planning is skipped if weights, gradients and AdamW's state need less than this fraction of the free memory"""


class NoPlan(UserError):
    """Raised if the memory of a training run cannot be planned."""


def teacher_dtype(precision: str) -> torch.dtype:
    """Return the teacher's dtype: bf16 if training uses bf16, else fp32."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


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


@dataclass(frozen=True)
class Step:
    """Settings that determine the memory of a training step."""

    build_student: Callable[[], GPT]
    build_optimizer: Callable[[Any], torch.optim.Optimizer]
    """Makes the optimizer from the student's parameters"""
    precision: str
    device: torch.device
    n_devices: int
    is_sharded: bool
    """True if the student is sharded over the devices"""
    micro_batch_size: int
    seq_length: int
    is_accumulating: bool
    """True if a step accumulates several micro-batches"""
    max_norm: float | None
    objective: Objective
    activation_checkpointing: bool = False
    tie_embeddings: bool = False
    """True if the student's LM head shares the embedding matrix"""
    build_teacher: Callable[[], GPT] | None = None
    teacher_is_sharded: bool = False
    quantized_bytes: int = 0
    """Bytes that quantisation of the teacher saves"""
    build_hidden: Callable[[GPT], HiddenLoss] | None = None
    """Makes the hidden-state loss from the student"""
    is_elsewhere: bool = False
    """True if training will run on GPUs that this machine lacks; `device` is then the CPU as a stand-in"""

    @classmethod
    def of(
        cls,
        train: TrainArgs,
        build_student: Callable[[], GPT],
        optimizer: str | dict,
        precision: str,
        device: torch.device,
        n_devices: int,
        strategy: str,
        seq_length: int,
        **rest: Any,
    ) -> Step:
        """Return the step of a training command, from its arguments.

        Args:
            train: The section `train`, with the batch sizes.
            build_student: Makes the model.
            optimizer: An optimizer's name or config.
            precision: Fabric's name of the precision.
            device: Device that training runs on.
            n_devices: Number of devices on all machines.
            strategy: "auto", "fsdp" or "ddp".
            seq_length: Tokens per sample.
            rest: The other fields, such as the objective.
        """
        is_fused = device.type == "cuda" or rest.get("is_elsewhere", False)
        return cls(
            build_student=build_student,
            build_optimizer=lambda weights: instantiate_torch_optimizer(optimizer, weights, fused=is_fused),
            precision=precision,
            device=device,
            n_devices=n_devices,
            is_sharded=strategy != "ddp",
            micro_batch_size=train.micro_batch_size,
            seq_length=seq_length,
            is_accumulating=train.gradient_accumulation_iters(n_devices) > 1,
            max_norm=train.max_norm,
            **rest,
        )


def show_plan(step: Step, placement: str, n_local: int, is_final: bool = False) -> bool:
    """Print the planned memory, and return whether the teacher must be sharded.

    See `choose_placement` for the arguments.
    """
    is_sharded, text = choose_placement(step, placement, n_local, is_final)
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
    """Return the memory plan of a step, by running it on tensors without data after the optimizer has made its state.

    No process group may exist yet: if devices share a model, a fake one is created and destroyed in the end.

    Args:
        step: The step to run.
    """
    for dtype in (torch.bfloat16, torch.float16):
        accumulates_products(step.device.type, dtype)  # tried now, because it needs tensors with data
    shared = step.n_devices > 1 and (step.is_sharded or step.teacher_is_sharded)
    live = LiveBytes()
    devices = _pretended_devices(step) if shared else nullcontext()
    chunks = _chunks_of_a_gpu() if step.is_elsewhere else nullcontext()
    without_content = FakeTensorMode(allow_non_fake_inputs=True)
    routing = RoutesToFirst()
    with torch.random.fork_rng(devices=[]), devices as mesh, chunks, without_content, live, routing, step.device:
        root = _student(step, mesh)
        routing.watch(root)
        weights = live.now
        teacher = None if step.build_teacher is None else _Teacher(step, root, mesh)
        if teacher is not None:
            routing.watch(teacher.model)
        teacher_bytes = live.now - weights
        optimizer = step.build_optimizer(root.parameters())
        for weight in root.parameters():
            weight.grad = torch.empty_like(weight)
        optimizer.step()  # creates its state
        optimizer.zero_grad()
        live.peak = live.now
        gradients = _run(step, root, teacher, optimizer)
        state = _n_bytes(value for slots in optimizer.state.values() for value in slots.values())
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
    """Return the CPU bytes that saving takes, given the bytes of weights and optimizer state on each device."""
    if step.n_devices > 1 and step.is_sharded:
        return (weights + state) * step.n_devices
    return 0 if _is_on_cpu(step) else max(weights, state)  # copied from the device one file at a time


def _is_on_cpu(step: Step) -> bool:
    return step.device.type == "cpu" and not step.is_elsewhere


def _student(step: Step, mesh: Any) -> LossModel:
    with _default_dtype(weights_dtype(step.precision)):
        model = step.build_student()
    if step.tie_embeddings:
        tie(model)
    model.max_seq_length = step.seq_length
    if step.activation_checkpointing:
        checkpoint_activations(model)
    root = LossModel(model, None if step.build_hidden is None else step.build_hidden(model))
    root.objective = step.objective
    return shard_student(root, mesh, step.precision) if mesh is not None and step.is_sharded else root


class _Teacher:
    """A teacher without data that runs like `litgpt_whittle.training.teacher.LiveTeacher`."""

    def __init__(self, step: Step, root: LossModel, mesh: Any) -> None:
        assert step.build_teacher is not None
        with _default_dtype(teacher_dtype(step.precision)):
            self.model = step.build_teacher().requires_grad_(False).eval()
        self.model.max_seq_length = step.seq_length
        self.watch = None if root.hidden is None else Watch(self.model, set(root.hidden.pairs.values()))
        if step.teacher_is_sharded:
            shard_frozen(self.model, mesh, keep_root=True)

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> SoftTargets:
        if self.watch is not None:
            self.watch.is_on = True
        head_input = hidden_states(self.model, input_ids)
        streams = None if self.watch is None else self.watch.take()
        return TeacherLogits(head_input, self.model.config.final_logit_softcapping, streams)


def _run(step: Step, root: LossModel, teacher: _Teacher | None, optimizer: torch.optim.Optimizer) -> int:
    """Run one optimizer step and return the bytes of its gradients."""
    ids = torch.zeros(step.micro_batch_size, step.seq_length, dtype=torch.long)
    autocast = torch.autocast(step.device.type, AUTOCAST.get(step.precision), enabled=step.precision in AUTOCAST)
    for is_last in [False, True] if step.is_accumulating else [True]:
        if isinstance(root, FSDPModule):
            root.set_requires_gradient_sync(is_last)
        said = None if teacher is None else teacher(ids)
        with autocast:
            loss = root(ids, ids, said).loss
        loss.backward()
        del loss, said
    n_bytes = _n_bytes(weight.grad for weight in root.parameters())
    if step.max_norm is not None:
        torch.nn.utils.clip_grad_norm_(root.parameters(), step.max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return n_bytes


@contextmanager
def _pretended_devices(step: Step) -> Iterator[Any]:
    """Create a device mesh on a fake process group, in which this is the only process."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=step.n_devices)
    try:
        yield init_device_mesh(step.device.type, (step.n_devices,))
    finally:
        distributed.destroy_process_group()


@contextmanager
def _chunks_of_a_gpu() -> Iterator[None]:
    """Use a GPU's chunk sizes for the head on the CPU."""
    before = CHUNK_ELEMENTS["cpu"], PART_ELEMENTS["cpu"]
    CHUNK_ELEMENTS["cpu"] = PART_ELEMENTS["cpu"] = CHUNK_ELEMENTS["cuda"]
    try:
        yield
    finally:
        CHUNK_ELEMENTS["cpu"], PART_ELEMENTS["cpu"] = before


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _n_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of tensors; memory that several share, such as a block's sharded gradients, counts once."""
    storages = [_own(tensor).untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class LiveBytes(TorchDispatchMode):
    """Tracks the current and peak memory of all live tensors that are created while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> LiveBytes:
        self._resize = torch.UntypedStorage.resize_
        # FSDP frees gathered parameters this way, bypassing the dispatcher

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = self._resize(storage, size)
            self._note(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self._note(_own(made).untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self.now += n_bytes - self._sizes.get(key, 0)
        self._sizes[key] = n_bytes
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class RoutesToFirst(TorchDispatchMode):
    """Routes every token of a mixture of experts to the first experts, for tensors without data.

    litgpt's `LLaMAMoE` looks up each expert's tokens in turn, by `torch.where` on a mask of shape (tokens,
    experts per token). Peak memory is highest if all tokens go to the same experts. The activations stored for the
    backward pass have the same size under any routing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._n_looked_up = 0

    def watch(self, model: nn.Module) -> None:
        """Reset the count of looked-up experts whenever one of the model's mixtures of experts runs."""
        for module in model.modules():
            if isinstance(module, LLaMAMoE):
                module.register_forward_pre_hook(self._begin)

    def _begin(self, *_: Any) -> None:
        self._n_looked_up = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.ops.aten.nonzero.default:
            return func(*args, **(kwargs or {}))
        mask = args[0]
        n_tokens, n_experts_per_token = mask.shape
        n_rows = n_tokens if self._n_looked_up < n_experts_per_token else 0
        self._n_looked_up += 1
        return mask.new_empty((n_rows, mask.dim()), dtype=torch.long)
