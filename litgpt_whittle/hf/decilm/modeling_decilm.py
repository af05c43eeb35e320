"""A Llama whose layers differ in width, made of the layers of `transformers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .configuration_decilm import DeciLMConfig


class NoNorm(nn.Module):
    """The norm before a sub-layer that is left out."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class NoAttention(nn.Module):
    """Attention that adds nothing."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.new_zeros(()), None


class NoMLP(nn.Module):
    """An MLP that adds nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


class DeciLMForCausalLM(LlamaForCausalLM):
    """A Llama with a language-modelling head and sizes for each layer.

    Args:
        config: The config.
    """

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        for i, block in enumerate(config.block_configs):
            layer: Any = LlamaDecoderLayer(config.layer_config(i), i)
            layer.self_attn.config = config  # a later choice of the attention's implementation concerns all layers
            if block.attention.no_op:
                layer.input_layernorm, layer.self_attn = NoNorm(), NoAttention()
            if block.ffn.no_op:
                layer.post_attention_layernorm, layer.mlp = NoNorm(), NoMLP()
            self.model.layers[i] = layer
        self.post_init()
