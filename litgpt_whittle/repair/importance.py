"""Optimal-Brain-Surgeon saliency of heads and neurons (Hassibi & Stork, 1993), for groups of inputs of a linear map.

The output of a removed neuron or head is partly a linear function of the kept units, and a repair recovers that part
(`litgpt_whittle.repair`). A unit's importance is therefore the error after the best repair, not the size of its weights
or activations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def elimination_order(
    covariance: torch.Tensor, weight: torch.Tensor, units: torch.Tensor, n_keep: int = 0, damping: float = 1e-4
) -> list[int]:
    """Return the greedy OBS elimination order: repeatedly remove the unit with the smallest saliency.

    With H the inverse covariance of the remaining inputs and W the repaired map, removing unit u increases E‖W z − y‖²
    by its saliency tr(Wᵤ (Hᵤᵤ)⁻¹ Wᵤᵀ) (Hassibi & Stork, 1993, equation 5, for several inputs at once). With many units
    remaining, 1/32 of them are removed per step.

    Args:
        covariance: Covariance of the map's inputs z, shape (n, n).
        weight: The map, shape (n_out, n).
        units: Input indices of each unit, shape (n_units, size); their order does not matter.
        n_keep: Number of units to keep.
        damping: Ridge relative to the diagonal.

    Returns:
        The removed units, the least important first.
    """
    dtype, device = covariance.dtype, covariance.device
    diagonal = covariance.diagonal()
    scale = torch.maximum(diagonal, (diagonal.mean() * 1e-6).clamp_min(1e-30))
    n_units, size = units.shape
    # sort inputs by unit
    order = units.flatten()
    damped = covariance.clone()
    damped.diagonal().add_(damping * scale)
    inverse, failed = torch.linalg.inv_ex(damped)
    del damped
    inverse, weight = inverse[order][:, order], weight.to(dtype)[:, order]
    alive = torch.arange(n_units, device=device)
    removed: list[torch.Tensor] = []
    # nothing in this loop waits for a GPU
    for n, n_now in _rounds(n_units, n_keep):
        blocks = inverse.view(n, size, n, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (n, size, size)
        ours = weight.view(-1, n, size).transpose(0, 1)  # (n, n_out, size)
        inverted, blocks_failed = torch.linalg.inv_ex(blocks)
        costs = (ours @ inverted * ours).sum((1, 2))
        going = costs.topk(n_now, largest=False, sorted=True).indices.sort().values
        removed.append(alive[going[costs[going].argsort()]])
        # a stable sort lists the remaining units in order
        staying = torch.zeros_like(alive).index_fill(0, going, 1).sort(stable=True).indices[: n - n_now]
        out, stays = _inputs(going, size), _inputs(staying, size)
        across = inverse[out]
        share, solve_failed = torch.linalg.solve_ex(across[:, out], across[:, stays])
        weight = weight[:, stays] - weight[:, out] @ share
        inverse = inverse[stays[:, None], stays] - across[:, stays].T @ share
        failed = failed + blocks_failed.sum() + solve_failed
        alive = alive[staying]
    if failed:
        raise torch.linalg.LinAlgError("the inputs' covariance is singular")
    return torch.cat(removed).tolist() if removed else []


def _rounds(n_units: int, n_keep: int) -> Iterator[tuple[int, int]]:
    """Yield the numbers of remaining units and of units to remove, step by step."""
    n = n_units
    while n > n_keep:
        n_now = min(max(n // 32, 1), n - n_keep)
        yield n, n_now
        n -= n_now


def _inputs(units: torch.Tensor, size: int) -> torch.Tensor:
    """Return the inputs of units, if inputs are sorted by unit."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()
