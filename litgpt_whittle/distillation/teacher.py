"""What a teacher says about a batch: by running it, or from what was cached of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.distillation.cache import Cache
from litgpt_whittle.distillation.codecs import Codec
from litgpt_whittle.distillation.head import HeadLosses, SoftTargets, TeacherLogits, head_loss, hidden_states
from litgpt_whittle.distillation.hidden import Place, Watch
from litgpt_whittle.distillation.objective import SparseTargets
from litgpt_whittle.distillation.quantize import quantize
from litgpt_whittle.training.sharding import load_sharded


class Teacher(Protocol):
    """Gives a batch's soft targets."""

    def __call__(self, input_ids: torch.Tensor) -> SoftTargets:
        """Soft targets for token ids of shape (B, T)."""
        ...


class LiveTeacher:
    """A litgpt checkpoint that is run on every batch, without gradients.

    Args:
        checkpoint_dir: The teacher.
        max_seq_length: The longest sequence that it will see.
        dtype: Its weights' and activations' type; no autocast is needed.
        device: Where it runs.
        is_sharded: Whether its weights are spread over the processes (FSDP2), which then run it together.
        quantized: How its blocks are quantised, if they are (`litgpt_whittle.distillation.quantize`).
    """

    _watch: Watch | None = None

    def __init__(
        self,
        checkpoint_dir: Path,
        max_seq_length: int,
        dtype: torch.dtype,
        device: torch.device,
        is_sharded: bool = False,
        quantized: str | None = None,
    ) -> None:
        if is_sharded:
            self.model = load_sharded(checkpoint_dir, "SuperGPT", dtype, device, max_seq_length, keep_root=True)
            return
        if quantized is None:
            self.model = load_model(checkpoint_dir, dtype=dtype, device=device)
        else:
            self.model = quantize(load_model(checkpoint_dir, dtype=dtype), quantized, device)
        self.model.requires_grad_(False)
        self.model.max_seq_length = max_seq_length
        # positions need fp32 whatever the weights are
        self.model.cos, self.model.sin = self.model.rope_cache(device=device)

    def watch(self, places: Iterable[Place]) -> None:
        """Has the stream at some places given with the logits."""
        self._watch = Watch(self.model, set(places))
        self._watch.is_on = True

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> TeacherLogits:
        """The teacher's logits, made chunk by chunk when they are asked for."""
        head_input = hidden_states(self.model, input_ids)
        streams = None if self._watch is None else self._watch.take()
        return TeacherLogits(head_input, self.model.config.final_logit_softcapping, streams)

    @torch.no_grad()
    def losses(self, input_ids: torch.Tensor, targets: torch.Tensor) -> HeadLosses:
        """The teacher's own cross-entropy on a batch."""
        softcap = self.model.config.final_logit_softcapping
        return head_loss(hidden_states(self.model, input_ids), targets, softcap=softcap)


class CachedTeacher:
    """What was cached of a teacher, looked up by the content of each window.

    Args:
        cache: The cache.
        device: Where the targets are wanted.
    """

    def __init__(self, cache: Cache, device: torch.device) -> None:
        self.cache, self.device = cache, device

    def __call__(self, input_ids: torch.Tensor) -> CachedTargets:
        """What is stored of the batch's windows; decoded chunk by chunk when it is asked for.

        Raises:
            UserError: As `Cache.targets` does.
        """
        stored = self.cache.targets(input_ids.cpu())
        if self.device.type == "cuda":
            stored = stored.pin_memory().to(self.device, non_blocking=True)  # does not wait for the step before
        return CachedTargets(self.cache.codec, stored)


class CachedTargets:
    """Soft targets of one batch. Opaque to Fabric, as `TeacherLogits` is, so that nothing in it is cast.

    Args:
        codec: What decodes them.
        stored: Shape (B · T, *codec.shape).
    """

    def __init__(self, codec: Codec, stored: torch.Tensor) -> None:
        self.codec, self.stored, self.n_entries = codec, stored, codec.vocab_size

    def chunk(self, start: int, stop: int) -> torch.Tensor | SparseTargets:
        """About tokens `start` to `stop`, for the caller to overwrite."""
        return self.codec.decode(self.stored[start:stop])
