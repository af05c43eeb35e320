"""Write a student's sizes to Hugging Face's `config.json`, which lm-eval, tokenizers and exported models use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litgpt.config import Config


def student_hf_config(
    hf_config: dict[str, Any], config: Config, layers: Sequence[int] | None = None, tied: bool | None = None
) -> dict[str, Any]:
    """Return the teacher's Hugging Face config with the student's sizes.

    Args:
        hf_config: The content of the teacher's `config.json`.
        config: The student's litgpt config.
        layers: Index of the teacher's layer for each student layer; None if `hf_config` already lists the student's
            layers.
        tied: True if the student's LM head is tied to its embedding; `None` keeps the config's setting.
    """
    content = text_part(hf_config)
    if tied is not None:
        content["tie_word_embeddings"] = tied
    content |= _sizes(content, config)
    content |= _rope(content, config)
    if layer_types := _layer_types(content, config, layers):
        content["layer_types"] = layer_types
    return content


def expert_width(config: Config) -> int:
    """Return the neurons per expert: `moe_intermediate_size`, or `intermediate_size` if that is unset, as in litgpt."""
    return config.moe_intermediate_size or config.intermediate_size


def text_part(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a config; for a multimodal model only its text part, which litgpt converts."""
    if "text_config" not in hf_config:
        return dict(hf_config)
    content = {k: v for k, v in hf_config.items() if k not in ("text_config", "vision_config")}
    content |= hf_config["text_config"]
    if content.get("model_type") == "gemma3_text":
        content["architectures"] = ["Gemma3ForCausalLM"]
    return content


def _sizes(content: dict[str, Any], config: Config) -> dict[str, Any]:
    sizes = {
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        # Mixtral has no separate setting for the width of its experts
        "intermediate_size": expert_width(config)
        if content.get("model_type") == "mixtral"
        else config.intermediate_size,
    }
    where_known = {
        "head_dim": config.head_size,
        "num_kv_heads": config.n_query_groups,
        "ffn_hidden_size": config.intermediate_size,
        "moe_intermediate_size": expert_width(config),
        "num_experts": config.n_expert,
        "num_local_experts": config.n_expert,
        "n_routed_experts": config.n_expert,
    }
    sizes |= {key: value for key, value in where_known.items() if key in content}
    if config.n_head * config.head_size != config.n_embd:
        sizes["head_dim"] = config.head_size
    return sizes


def _rope(content: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return base and fraction of rotary dimensions in the layout of the file; `transformers` 5 nests them."""
    if content.get("rope_parameters"):
        rope = dict(content["rope_parameters"])
        if isinstance(rope.get("full_attention"), dict):  # Gemma 3 has a base for each kind of layer
            local = config.rope_base if config.rope_local_base_freq is None else config.rope_local_base_freq
            rope["full_attention"] = rope["full_attention"] | {"rope_theta": config.rope_base}
            rope["sliding_attention"] = rope["sliding_attention"] | {"rope_theta": local}
        else:
            rope["rope_theta"] = config.rope_base
            if "partial_rotary_factor" in rope:
                rope["partial_rotary_factor"] = config.rotary_percentage
        changes: dict[str, Any] = {"rope_parameters": rope}
    else:
        changes = {"rotary_emb_base" if "rotary_emb_base" in content else "rope_theta": config.rope_base}
        if config.rope_local_base_freq is not None:
            changes["rope_local_base_freq"] = config.rope_local_base_freq
    for key in ("partial_rotary_factor", "rotary_pct"):
        # GPT-NeoX reads no other key, even if it writes another
        if key in content or (key == "rotary_pct" and content.get("model_type") == "gpt_neox"):
            changes[key] = config.rotary_percentage
    return changes


def _layer_types(content: dict[str, Any], config: Config, layers: Sequence[int] | None) -> list[str] | None:
    """Return the kind of attention of each kept layer; None if `transformers` needs no list."""
    known = content.get("layer_types")
    indices = config.sliding_window_indices
    if config.sliding_window_size is not None and (known or len(set(indices)) > 1):
        return ["sliding_attention" if index else "full_attention" for index in indices]
    if known and layers is not None:
        return [known[layer] for layer in layers]
    return known
