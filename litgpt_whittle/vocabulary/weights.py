"""Slice a model's embedding and LM head to the kept tokens."""

from __future__ import annotations

import copy

import torch
from litgpt.config import Config

from litgpt_whittle.index_plan import RULES, take_along
from litgpt_whittle.supergpt import Weights, is_tied
from litgpt_whittle.unit_index import UnitIndex


def with_vocabulary(config: Config, size: int) -> Config:
    """Return a litgpt config with another vocabulary, without padding."""
    smaller = copy.deepcopy(config)
    smaller.vocab_size = smaller.padded_vocab_size = size
    return smaller


def sliced_to(weights: Weights, tokens: UnitIndex) -> Weights:
    """Return a model's weights with the rows of some tokens only.

    The logits are those of the whole model at these tokens, so its probabilities are renormalised over them.

    Args:
        weights: Weights of a litgpt model, by name; tied ones stay tied.
        tokens: Ids of the tokens, in the order of the new rows.
    """
    index, sliced = torch.from_numpy(tokens.indices.copy()), dict(weights)
    for module in (name for name, axes in RULES.items() if axes[0] == "vocab"):
        for name in (f"{module}.weight", f"{module}.bias"):
            if name in weights:
                sliced[name] = take_along(weights[name], 0, index)
    if is_tied(weights):
        sliced["lm_head.weight"] = sliced["transformer.wte.weight"]
    return sliced
