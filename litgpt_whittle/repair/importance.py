"""Optimal-Brain-Surgeon saliency of heads and neurons (Hassibi & Stork, 1993), for groups of inputs of a linear map.

The output of a removed neuron or head is partly a linear function of the kept units, and a repair recovers that part
(`litgpt_whittle.repair`). A unit's importance is therefore the error after the best repair, not the size of its weights
or activations.
"""

from __future__ import annotations

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
    dtype = covariance.dtype
    scale = covariance.diagonal().clamp_min(max(float(covariance.diagonal().mean()) * 1e-6, 1e-30))
    n_units, size = units.shape
    # sort inputs by unit
    order = units.flatten()
    inverse = torch.linalg.inv(covariance + torch.diag(damping * scale))[order][:, order]
    weight = weight.to(dtype)[:, order]
    alive = list(range(n_units))
    removed: list[int] = []
    while len(alive) > n_keep:
        n = len(alive)
        blocks = inverse.view(n, size, n, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (n, size, size)
        ours = weight.view(-1, n, size).transpose(0, 1)  # (n, n_out, size)
        costs = (ours @ torch.linalg.inv(blocks) * ours).sum((1, 2))
        n_now = min(max(n // 32, 1), n - n_keep)
        going = costs.topk(n_now, largest=False, sorted=True).indices.sort().values
        removed += [alive[i] for i in costs[going].argsort().tolist() for i in [int(going[i])]]
        out = (going[:, None] * size + torch.arange(size, device=going.device)).flatten()
        stays = torch.ones(n * size, dtype=torch.bool, device=going.device)
        stays[out] = False
        stays = stays.nonzero().squeeze(1)
        across = inverse[out]
        share = torch.linalg.solve(across[:, out], across[:, stays])
        weight = weight[:, stays] - weight[:, out] @ share
        inverse = inverse[stays[:, None], stays] - across[:, stays].T @ share
        gone = set(going.tolist())
        alive = [unit for i, unit in enumerate(alive) if i not in gone]
    return removed
