"""A teacher's soft targets for a batch, computed by running the teacher or read from its cache."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import nn

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.distillation.cache import Cache
from litgpt_whittle.distillation.codecs import Codec
from litgpt_whittle.distillation.head import (
    HeadInput,
    HeadLosses,
    SoftTargets,
    TeacherLogits,
    head_loss,
    hidden_states,
    tap_head,
)
from litgpt_whittle.distillation.hidden import Place, Watch
from litgpt_whittle.distillation.objective import SparseTargets
from litgpt_whittle.distillation.quantize import quantize
from litgpt_whittle.tensors import to_device
from litgpt_whittle.training.sharding import load_sharded


class Teacher(Protocol):
    """Callable that returns a batch's soft targets."""

    def __call__(self, input_ids: torch.Tensor) -> SoftTargets:
        """Return the soft targets for token ids of shape (B, T)."""
        ...


class LiveTeacher:
    """A litgpt checkpoint that is run on every batch, without gradients.

    Args:
        checkpoint_dir: The teacher's checkpoint directory.
        max_seq_length: Length of the longest input sequence.
        dtype: Type of weights and activations; no autocast is needed.
        device: The teacher's device.
        is_sharded: If true, shard the weights over the processes (FSDP2); all processes must then call the teacher at
            the same time.
        quantized: Quantisation mode of the blocks (a key of `litgpt_whittle.distillation.quantize.BITS`), if any.
    """

    _watch: Watch | None = None
    _compiled: nn.Module | None = None
    _shape: torch.Size | None = None
    """Shape of the token ids that the compiled model accepts"""

    def __init__(
        self,
        checkpoint_dir: Path,
        max_seq_length: int,
        dtype: torch.dtype,
        device: torch.device,
        is_sharded: bool = False,
        quantized: str | None = None,
    ) -> None:
        self._can_compile = not is_sharded and quantized is None
        if is_sharded:
            self.model = load_sharded(checkpoint_dir, "SuperGPT", dtype, device, max_seq_length, keep_root=True)
            return
        if quantized is None:
            self.model = load_model(checkpoint_dir, dtype=dtype, device=device)
        else:
            self.model = quantize(load_model(checkpoint_dir, dtype=dtype), quantized, device)
        self.model.requires_grad_(False)
        self.model.max_seq_length = max_seq_length

    def watch(self, places: Iterable[Place]) -> None:
        """Record the hidden states at some places, so that later calls return them with the logits."""
        self._watch = Watch(self.model, set(places))
        self._watch.is_on = True

    def compile(self, batch_size: int, seq_length: int) -> None:
        """Compile the model for training batches; no-op for a sharded or quantized model.

        Batches of other shapes, as in validation, run uncompiled, because each shape would be compiled separately.
        """
        if self._can_compile:
            tap_head(self.model)
            self._compiled = cast(nn.Module, torch.compile(self.model, dynamic=False))
            self._shape = torch.Size((batch_size, seq_length))

    def _head_input(self, input_ids: torch.Tensor) -> HeadInput:
        compiled = self._compiled if input_ids.shape == self._shape else None
        return hidden_states(self.model if compiled is None else compiled, input_ids)

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> TeacherLogits:
        """Return the teacher's logits, which are computed in chunks of tokens on request."""
        head_input = self._head_input(input_ids)
        streams = None if self._watch is None else self._watch.take()
        return TeacherLogits(head_input, self.model.config.final_logit_softcapping, streams)

    @torch.no_grad()
    def losses(self, input_ids: torch.Tensor, targets: torch.Tensor) -> HeadLosses:
        """Return the losses of the teacher itself on a batch: the cross-entropy in nats, without distillation."""
        softcap = self.model.config.final_logit_softcapping
        losses = head_loss(self._head_input(input_ids), targets, softcap=softcap)
        if self._watch is not None:
            self._watch.take()  # clears the recorded hidden states, as the compiled model expects at its next call
        return losses


class CachedTeacher:
    """A teacher's cached targets, looked up by the content of each window.

    Args:
        cache: The cache.
        device: Device of the targets.
    """

    def __init__(self, cache: Cache, device: torch.device) -> None:
        self.cache, self.device = cache, device
        self._next: torch.Tensor | None = None

    def look_up(self, input_ids: torch.Tensor) -> None:
        """Look up the targets for the next call, whose batch has these token ids, shape (B, T), in CPU memory.

        Without this, the call copies the token ids back from the device, which waits for all of its earlier work.

        Raises:
            UserError: As in `Cache.targets`.
        """
        self._next = to_device(self.cache.targets(input_ids), self.device)

    def __call__(self, input_ids: torch.Tensor) -> CachedTargets:
        """Return the cached targets of the batch, which are decoded in chunks of tokens on request.

        Raises:
            UserError: As in `Cache.targets`.
        """
        stored, self._next = self._next, None
        if stored is None:
            stored = to_device(self.cache.targets(input_ids.cpu()), self.device)
        return CachedTargets(self.cache.codec, stored)


class CachedTargets:
    """Cached soft targets of one batch. Not a tuple or dataclass, so that Fabric does not cast its tensors.

    Args:
        codec: The codec that decodes them.
        stored: The encoded targets, shape (B · T, *codec.shape).
    """

    def __init__(self, codec: Codec, stored: torch.Tensor) -> None:
        self.codec, self.stored, self.n_entries = codec, stored, codec.vocab_size

    def chunk(self, start: int, stop: int) -> torch.Tensor | SparseTargets:
        """Return the decoded targets of tokens `start` to `stop`; the caller may overwrite them."""
        return self.codec.decode(self.stored[start:stop])
