"""Trains what the closed form has found a little further, and keeps what came of it where it is better."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm


class Errors(NamedTuple):
    """Of what was refined, on held-out tokens."""

    before: float
    after: float
    """The same as before where nothing better was found"""


def refine(
    rates: Iterable[tuple[nn.Parameter, float]],
    n_steps: int,
    loss: Callable[[int], torch.Tensor],
    error: Callable[[], float],
    bar: tqdm | None = None,
) -> Errors:
    """Trains parameters in place by Adam, each with a learning rate of its own, annealed to zero.

    Args:
        rates: The parameters and their learning rates.
        n_steps: How many steps.
        loss: What to lower at a step, given its number.
        error: What is to be lower in the end; parameters go back to what they were if it is not.
        bar: Shows the steps.
    """
    groups = [{"params": [parameter], "lr": lr} for parameter, lr in rates]
    parameters = [group["params"][0] for group in groups]
    start, before = [parameter.detach().clone() for parameter in parameters], error()
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        for step in range(n_steps):
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
            schedule.step()
            if bar is not None:
                bar.update()
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
    after = error()
    if after < before:
        return Errors(before, after)
    for parameter, old in zip(parameters, start):
        parameter.data.copy_(old)
    return Errors(before, before)
