"""Random generators and epochs of a dataloader."""

from __future__ import annotations

from typing import Any

import torch


def _parts(loader: Any) -> list[Any]:
    """Return a dataloader and its samplers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    parts.append(getattr(batch_sampler, "batch_sampler", None))  # wrapped by `SkippingBatches`
    return list({id(part): part for part in parts}.values())


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the random generators that belong to a dataloader."""
    found = [getattr(part, "generator", None) for part in _parts(loader)]
    return [g for g in dict.fromkeys(found) if isinstance(g, torch.Generator)]


def generator_states(loader: Any) -> list[torch.Tensor]:
    """Return the states of the generators that belong to a dataloader."""
    return [generator.get_state() for generator in generators_of(loader)]


def set_generator_states(loader: Any, states: list[torch.Tensor]) -> None:
    """Restore the states returned by `generator_states`."""
    for generator, state in zip(generators_of(loader), states):
        generator.set_state(state)


def set_epoch(loader: Any, epoch: int) -> None:
    """Call `set_epoch` on the samplers whose order depends on the epoch."""
    for part in _parts(loader):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
