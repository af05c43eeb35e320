"""What a teacher says about a batch, by running it, behind an interface that a cached teacher can fill too."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.head import HeadLosses, TeacherLogits, head_loss, hidden_states
from litgpt_whittle.sharding import load_sharded


class Teacher(Protocol):
    """Gives a batch's soft targets."""

    def __call__(self, input_ids: torch.Tensor) -> TeacherLogits:
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
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        max_seq_length: int,
        dtype: torch.dtype,
        device: torch.device,
        is_sharded: bool = False,
    ) -> None:
        if is_sharded:
            self.model = load_sharded(checkpoint_dir, "SuperGPT", dtype, device, max_seq_length, keep_root=True)
            return
        self.model = load_model(checkpoint_dir, dtype=dtype, device=device).requires_grad_(False)
        self.model.max_seq_length = max_seq_length
        # positions need fp32 whatever the weights are
        self.model.cos, self.model.sin = self.model.rope_cache(device=device)

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> TeacherLogits:
        """The teacher's logits, made chunk by chunk when they are asked for."""
        return TeacherLogits(hidden_states(self.model, input_ids), self.model.config.final_logit_softcapping)

    @torch.no_grad()
    def losses(self, input_ids: torch.Tensor, targets: torch.Tensor) -> HeadLosses:
        """The teacher's own cross-entropy on a batch."""
        softcap = self.model.config.final_logit_softcapping
        return head_loss(hidden_states(self.model, input_ids), targets, softcap=softcap)
