"""Quick order of a teacher's units and layers, from one forward pass over a few thousand tokens.

The score of a unit is proportional to the root mean square over tokens of its contribution to the residual stream. A
neuron's contribution is its activation times the norm of its column in the output projection. Channels are scored by
their contributions to the input projections and the LM head, layers and their sub-layers by block influence. `litgpt
rank` (`litgpt_whittle.ranking.scores`) also measures gradients and perplexities, which takes more time and memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from litgpt.model import GPT
from torch import nn

from litgpt_whittle.distillation.head import hidden_states
from litgpt_whittle.index_plan import axes_of, units_of
from litgpt_whittle.ranking.influence import Influence
from litgpt_whittle.ranking.order import Order
from litgpt_whittle.ranking.scores import Autocast
from litgpt_whittle.subnet import layer_sizes
from litgpt_whittle.tensors import upcast

N_TOKENS = 4096
"""Number of tokens to read"""

ROWS_TOKENS = 2048
"""Number of tokens per forward pass"""


@torch.no_grad()
def quick_order(
    model: GPT, batches: Iterable[torch.Tensor], autocast: Autocast = nullcontext, n_tokens: int = N_TOKENS
) -> Order:
    """Order a teacher's units and layers by their activations on calibration tokens.

    Args:
        model: The teacher.
        batches: Token ids, each of shape (B, T).
        autocast: Returns an autocast context.
        n_tokens: Approximate number of tokens to read.
    """
    sums, missing = _Sums(model), n_tokens
    for ids in (rows for batch in batches for rows in batch.split(max(ROWS_TOKENS // batch.shape[1], 1))):
        if missing <= 0:
            break
        missing -= ids.numel()
        with sums.watching(), autocast():
            head = hidden_states(model, ids.to(model.transformer.wte.weight.device))
        sums.n_embd += _squares(head.hidden, head.weight)
    own = tuple({kind: score.sqrt().numpy() for kind, score in units.items()} for units in sums.layers)
    sublayers = {part: influence.numpy() for part, influence in sums.influence.sublayers.items()}
    return Order.by(model.config, sums.n_embd.sqrt().numpy(), sums.influence.layers.numpy(), own, sublayers)


class _Sums:
    """Hooks that accumulate squared contributions of units and block influence while a model runs."""

    def __init__(self, model: GPT) -> None:
        self.model, config = model, model.config
        zeros = partial(torch.zeros, dtype=torch.float64)
        self.n_embd, self.influence = zeros(config.n_embd), Influence(model)
        self.layers = [{k: zeros(n) for k, n in layer_sizes(config, i).items()} for i in range(config.n_layer)]
        self.units = [units_of(config, i) for i in range(config.n_layer)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = self.influence.hooks()
        for layer, block in enumerate(self.model.transformer.h):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    handles.append(module.register_forward_pre_hook(partial(self._add_inputs, layer, axes_of(name))))
                if name.startswith("mlp.experts.") and name.count(".") == 2:
                    handles.append(module.register_forward_hook(partial(self._add_expert, layer, int(name[12:]))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_inputs(self, layer: int, axes: tuple[str, ...], module: nn.Linear, inputs: tuple) -> None:
        if axes[1] == "n_embd":
            self.n_embd += _squares(inputs[0], module.weight)
            return
        for kind, own in self.units[layer].items():
            if axes[1] not in own:
                continue
            indices = torch.from_numpy(own[axes[1]]).to(module.weight.device)  # (n_units, size)
            if indices.shape[1] == 1:
                squares = _squares(inputs[0], module.weight)[own[axes[1]][:, 0]]
            else:
                squares = torch.stack([_square(inputs[0][..., unit], module.weight[:, unit]) for unit in indices])
            self.layers[layer][kind] += squares

    def _add_expert(self, layer: int, expert: int, _: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.layers[layer]["n_expert"][expert] += upcast(output).square().sum().cpu().double()


def _square(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of a linear map's output, summed over tokens."""
    return upcast(F.linear(x, weight)).square().sum().cpu().double()


def _squares(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of each input's contribution to a linear map, summed over tokens, shape (n_in,)."""
    norms = torch.linalg.vector_norm(weight, dim=0, dtype=torch.promote_types(weight.dtype, torch.float32)).square()
    return (upcast(x).flatten(0, -2).square().sum(0) * norms).cpu().double()
