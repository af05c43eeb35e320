"""Log-likelihoods of continuations, with logits only of the scored positions, in chunks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from litgpt.model import GPT

from litgpt_whittle.distillation.head import CHUNK_ELEMENTS, HeadInput, TeacherLogits, hidden_states
from litgpt_whittle.processes import give_back_freed
from litgpt_whittle.tasks.batches import TaskBatch
from litgpt_whittle.tensors import in_sums_dtype


@torch.no_grad()
def log_likelihoods(model: GPT, batches: Iterable[TaskBatch], n: int) -> list[tuple[float, bool]]:
    """Return each continuation's log-likelihood in nats, and whether all of its tokens are the most likely ones.

    Args:
        model: A litgpt model, or a running super-network; its head becomes a `HeadTap`.
        batches: Batches on the model's device.
        n: Number of continuations.
    """
    device = model.lm_head.weight.device
    sums = in_sums_dtype(torch.zeros(n, device=device))
    n_misses = torch.zeros(n, dtype=torch.long, device=device)
    for batch in batches:
        caught = hidden_states(model, batch.input_ids)
        picked = caught._replace(hidden=caught.hidden[batch.rows, batch.positions])  # (n_scored, n_embd)
        log_probs, is_top = _token_scores(picked, batch.targets, model.config.final_logit_softcapping)
        sums.index_add_(0, batch.continuations, log_probs.to(sums.dtype))
        n_misses.index_add_(0, batch.continuations, (~is_top).long())
        give_back_freed()
    return list(zip(sums.tolist(), (n_misses == 0).tolist()))


def _token_scores(head: HeadInput, targets: torch.Tensor, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each target, at least fp32, and whether it is the most likely token."""
    n_rows = max(CHUNK_ELEMENTS.get(targets.device.type, 2**24) // len(head.weight), 32)
    logits_of, log_probs, is_top = TeacherLogits(head, softcap), [], []
    for start in range(0, len(targets), n_rows):
        wanted = targets[start : start + n_rows]
        logits = logits_of.chunk(start, start + len(wanted))  # (n_rows, V)
        is_top.append(logits.argmax(-1) == wanted)
        log_probs.append(logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(-1))
    return torch.cat(log_probs), torch.cat(is_top)
