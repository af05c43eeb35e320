"""Train parameters from the closed-form solution, and keep the result if the held-out error decreases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from tqdm import tqdm

from litgpt_whittle.scratch import Scratch

SECONDS_BETWEEN_SAVES = 60.0


class Errors(NamedTuple):
    """Errors on held-out tokens."""

    before: float
    after: float
    """Equal to `before` if training did not help, because the parameters are then restored"""


def refine(
    rates: Iterable[tuple[torch.Tensor, float]],
    loss: Callable[[int], torch.Tensor],
    error: Callable[[], float],
    bar: tqdm,
    *,
    warmup: float = 0.0,
    max_norm: float | None = None,
    scratch: Scratch | None = None,
    name: str = "refined",
) -> Errors:
    """Train parameters in place with Adam, each with its own learning rate, annealed to zero by a cosine schedule.

    Args:
        rates: The parameters and their learning rates.
        loss: Returns the loss of a step, given its index.
        error: Returns the error on held-out tokens; the parameters are restored if it does not decrease.
        bar: Progress bar over the steps; its total is the number of steps.
        warmup: Fraction of the steps in which the learning rates rise linearly.
        max_norm: Maximum norm for gradient clipping.
        scratch: Folder for the training state, saved once a minute, from which an interrupted run resumes.
        name: Name of the state in the scratch folder.
    """
    rates, n_steps = list(rates), bar.total
    parameters = [parameter for parameter, _ in rates]
    start = [parameter.detach().clone() for parameter in parameters]
    groups = [{"params": [parameter], "lr": lr} for parameter, lr in rates]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    n_warmup = int(warmup * n_steps)
    pieces: list[LRScheduler] = [CosineAnnealingLR(optimizer, max(n_steps - n_warmup, 1))]
    if n_warmup:
        pieces.insert(0, LinearLR(optimizer, 1 / (n_warmup + 1), 1.0, n_warmup))
    schedule = SequentialLR(optimizer, pieces, [n_warmup] if n_warmup else [])

    def state(step: int) -> dict:
        return {
            "step": step,
            "before": before,
            "parameters": [parameter.detach() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }

    first, saved = 0, scratch.load(name) if scratch is not None else None
    if saved is None:
        before = error()
    else:
        first, before = saved["step"], saved["before"]
        _restore(parameters, saved["parameters"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        bar.update(first)
    for parameter in parameters:
        parameter.requires_grad_(True)
    last_save = time.monotonic()
    with torch.enable_grad():
        for step in range(first, n_steps):
            optimizer.zero_grad()
            loss(step).backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
            schedule.step()
            bar.update()
            is_last = step + 1 == n_steps
            if scratch is not None and (is_last or time.monotonic() - last_save > SECONDS_BETWEEN_SAVES):
                scratch.save(name, state(step + 1))
                last_save = time.monotonic()
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
    after = error()
    if after < before:
        return Errors(before, after)
    _restore(parameters, start)
    return Errors(before, before)


def _restore(parameters: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values):
        parameter.data.copy_(value)
