"""Block influence of a teacher's layers and of their sub-layers (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from litgpt.model import GPT
from torch import nn

from litgpt_whittle.index_plan import SUBLAYERS
from litgpt_whittle.tensors import in_sums_dtype, upcast


class Influence:
    """Hooks that accumulate block influence while a model runs.

    The influence of a part is one minus the cosine similarity of the residual stream without and with what the part
    adds, summed over tokens. For an attention, that is the stream before the layer, without and with the attention's
    output. For an MLP, it is the stream after the layer, without and with the MLP's output.

    Args:
        model: A litgpt model.
    """

    def __init__(self, model: GPT) -> None:
        self.model, n_layer = model, model.config.n_layer
        self.layers = torch.zeros(n_layer, dtype=torch.float64)
        """Influence of whole layers, shape (n_layer,)"""
        self.sublayers = {part: torch.zeros(n_layer, dtype=torch.float64) for part in SUBLAYERS}
        """Influence of sub-layers by litgpt's names, shape (n_layer,) each"""
        self._added: dict[str, torch.Tensor] = {}
        """Outputs of the current block's sub-layers, which are added to the residual stream"""

    def hooks(self) -> list[Any]:
        """Register the hooks, and return their handles."""
        handles = []
        for layer, block in enumerate(self.model.transformer.h):
            handles.append(block.register_forward_hook(partial(self._add_block, layer)))
            for part, (_, after) in SUBLAYERS.items():
                handles.append(block.get_submodule(after).register_forward_hook(partial(self._note, part)))
        return handles

    def _note(self, part: str, _: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._added[part] = output.detach()

    def _add_block(self, layer: int, _: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        before, after = inputs[0].detach(), output.detach()
        self.layers[layer] += _change(before, after)
        self.sublayers["attn"][layer] += _change(before, before + self._added.pop("attn"))
        self.sublayers["mlp"][layer] += _change(after - self._added.pop("mlp"), after)


def _change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return one minus the cosine similarity of two residual streams, summed over tokens."""
    cosine = F.cosine_similarity(upcast(before), upcast(after), dim=-1)
    return in_sums_dtype(1 - cosine).sum().cpu()
