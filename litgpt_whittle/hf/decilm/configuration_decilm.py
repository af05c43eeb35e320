"""Config of a Llama whose layers differ in width, in the format of NVIDIA's Llama-Nemotron."""

from __future__ import annotations

import copy
from typing import Any

from transformers import LlamaConfig


class Settings(dict):
    """A dictionary whose entries are attributes, too: vLLM reads `block.attention.no_op`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__((k, Settings(v) if isinstance(v, dict) else v) for k, v in settings.items())

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def neurons(ffn_mult: float, hidden_size: int) -> int:
    """Return the width of an MLP as vLLM and llama.cpp compute it: rounded up to a multiple of 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // 256) * 256


class DeciLMConfig(LlamaConfig):
    """Config of a Llama with sizes for each layer.

    Args:
        block_configs: For each layer, the settings of `attention` (`n_heads_in_group`, the query heads of a query
            group) and `ffn` (`ffn_mult`, see `neurons`). A sub-layer with `no_op` is left out.
        **kwargs: Arguments of `LlamaConfig`.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        self.block_configs = [Settings(block) for block in block_configs or []]
        super().__init__(**kwargs)

    def layer_config(self, layer: int) -> DeciLMConfig:
        """Return the config of a Llama with the sizes of one layer."""
        block = self.block_configs[layer]
        config: Any = copy.copy(self)
        if not block.attention.no_op:
            config.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
        if not block.ffn.no_op:
            config.intermediate_size = neurons(block.ffn.ffn_mult, config.hidden_size)
        return config
