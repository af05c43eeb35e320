"""Which units to keep: those whose removal the others can least make up for.

What a removed neuron or head carried is partly a linear function of those that stay, and a repair gives that back
(`litgpt_whittle.repair`). So a unit is worth what is lost after the best repair, not the size of its weights or
activations: the criterion of Optimal Brain Surgeon (Hassibi & Stork, 1993), for groups of inputs of a linear map.
"""

from __future__ import annotations

import torch


def elimination_order(
    covariance: torch.Tensor, weight: torch.Tensor, units: torch.Tensor, n_keep: int = 0, damping: float = 1e-4
) -> list[int]:
    """Removes units one after the other, each time those that cost least after the best linear repair by the rest.

    With H the inverse covariance of what is left and W the repaired map, removing unit u costs
    tr(Wᵤ (Hᵤᵤ)⁻¹ Wᵤᵀ): the rise of E‖W z − y‖² (Hassibi & Stork, 1993, equation 5, for several inputs at once).
    While many are left, a few are removed at a time.

    Args:
        covariance: Of the map's inputs z, shape (n, n).
        weight: The map, shape (n_out, n).
        units: Which inputs belong to each unit, shape (n_units, size); their order does not matter.
        n_keep: Stop when so many units are left.
        damping: Ridge relative to the diagonal.

    Returns:
        The removed units, the least important first.
    """
    dtype = covariance.dtype
    scale = covariance.diagonal().clamp_min(max(float(covariance.diagonal().mean()) * 1e-6, 1e-30))
    n_units, size = units.shape
    # inputs in the order of their units
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
