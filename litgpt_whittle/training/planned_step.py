"""The training step that a memory plan runs on tensors without data, with sharding, optimizer and teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from litgpt.model import GPT, LLaMAMoE
from litgpt.utils import instantiate_torch_optimizer
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_whittle.distillation.head import LossModel, SoftTargets, TeacherLogits, hidden_states
from litgpt_whittle.distillation.hidden import HiddenLoss, Watch
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.supergpt import tie
from litgpt_whittle.tensors import weights_dtype
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.live_bytes import n_bytes
from litgpt_whittle.training.sharding import checkpoint_activations, shard_frozen, shard_student

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Dtype of autocast, by Fabric's name of the precision; other precisions use none"""


def teacher_dtype(precision: str) -> torch.dtype:
    """Return the teacher's dtype: bf16 if training uses bf16, else fp32."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


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
    """Bytes by which quantisation reduces the teacher, which is planned unquantized"""
    build_hidden: Callable[[GPT], HiddenLoss] | None = None
    """Makes the hidden-state loss from the student"""
    is_compiled: bool = False
    """True if the student is compiled, and on GPUs the losses of the logits, too"""
    is_elsewhere: bool = False
    """True if training will run on GPUs that this machine lacks; `device` is then the CPU as a stand-in"""

    @property
    def device_type(self) -> str:
        """Device type that training will run on: "cuda" or "cpu", for instance."""
        return "cuda" if self.is_elsewhere else self.device.type

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


def planned_student(step: Step, mesh: Any) -> LossModel:
    """Build the student with its losses, sharded over the devices of `mesh` if `step.is_sharded`."""
    with _default_dtype(weights_dtype(step.precision)):
        model = step.build_student()
    if step.tie_embeddings:
        tie(model)
    model.max_seq_length = step.seq_length
    if step.activation_checkpointing:
        checkpoint_activations(model)
    root = LossModel(model, None if step.build_hidden is None else step.build_hidden(model))
    root.objective, root.device_type = step.objective, step.device_type
    root.compiles_scores = step.is_compiled and step.device_type == "cuda"
    return shard_student(root, mesh, step.precision) if mesh is not None and step.is_sharded else root


class PlannedTeacher:
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


def run_step(step: Step, root: LossModel, teacher: PlannedTeacher | None, optimizer: torch.optim.Optimizer) -> int:
    """Run one optimizer step, and return the bytes that its gradients take."""
    ids = torch.zeros(step.micro_batch_size, step.seq_length, dtype=torch.long)
    autocast = torch.autocast(step.device.type, AUTOCAST.get(step.precision), enabled=step.precision in AUTOCAST)
    for is_last in [False, True] if step.is_accumulating else [True]:
        if isinstance(root, FSDPModule):
            root.set_requires_gradient_sync(is_last)
        soft_targets = None if teacher is None else teacher(ids)
        with autocast:
            loss = root(ids, ids, soft_targets).loss
        loss.backward()
        del loss, soft_targets
    gradients = n_bytes(weight.grad for weight in root.parameters())
    if step.max_norm is not None:
        torch.nn.utils.clip_grad_norm_(root.parameters(), step.max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return gradients


@contextmanager
def pretended_devices(step: Step) -> Iterator[Any]:
    """Create a device mesh on a fake process group, in which this is the only process."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=step.n_devices)
    try:
        yield init_device_mesh(step.device.type, (step.n_devices,))
    finally:
        distributed.destroy_process_group()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class RoutesToFirst(TorchDispatchMode):
    """Routes every token of a mixture of experts to the first experts, for tensors without data.

    litgpt's `LLaMAMoE` looks up the tokens of one expert after the other, by `torch.where` on a mask of shape (tokens,
    experts per token). Without data, the number of tokens found is unknown. Here, the first experts get all tokens, for
    which peak memory is highest. The activations stored for the backward pass have the same size under any routing.
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
