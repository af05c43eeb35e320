"""Map litgpt models to the equivalent models of `transformers`, with litgpt's own mapping of weight names.

Facts about classes and their settings come from `transformers`' configuration and modeling files (5.3). Like
`litgpt.scripts.convert_lit_checkpoint`, this file identifies families by the model's name (except for `Gemma-2b`, which
litgpt 0.5.13 treats as a Gemma 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from litgpt.config import Config
from litgpt.scripts import convert_lit_checkpoint as converter

from litgpt_whittle.errors import UserError
from litgpt_whittle.huggingface_config import expert_width


@dataclass(frozen=True)
class Family:
    """A model type of `transformers`, and the settings of litgpt that it supports."""

    model_type: str
    architecture: str
    """The class with a language-modelling head"""
    copy_weights: Callable[..., None]
    """litgpt's weight mapping: takes a config, the dictionary to fill and litgpt's weights"""
    facts: Callable[[Config], dict[str, Any]]
    """Returns the family's own settings in `config.json`, from litgpt's config"""
    norm_eps: str | None = "rms_norm_eps"
    """Name of the setting for the norms' epsilon; `None` if the epsilon is always 1e-5"""
    activation: str = "hidden_act"
    """Name of the setting for the activation function"""
    rotary: str | None = None
    """Name of the setting for the fraction of rotary dimensions; `None` if all are rotary"""
    free_heads: bool = True
    """True if heads may have any size; if false, the class requires `n_embd = n_head * head_size`"""
    mixed_windows: bool = False
    """True if some layers may have a sliding window and others global attention"""
    parallel_residual: bool | None = False
    """`None` if both values are supported"""
    expresses: tuple[str, ...] = ()
    """Supported settings among those in `_RARE`"""


_RARE = {
    "attention_scores_scalar": None,
    "attention_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_size": None,
    "lm_head_bias": False,
    "rope_adjustments": None,
    "rope_condense_ratio": 1,
    "rope_interleave": False,
    "latent_attention": None,
    "n_shared_expert": None,
    "n_expert_groups": None,
    "first_k_dense_replace": None,
    "routed_scaling_factor": 1.0,
}
"""Settings that few families support, and their values in all other families"""

_ROPE = ("rope_adjustments", "rope_condense_ratio")
_GEMMA = ("attention_scores_scalar", "attention_logit_softcapping", "final_logit_softcapping", "sliding_window_size")


def _bias(config: Config) -> dict[str, Any]:
    return {"attention_bias": config.bias or config.attn_bias, "mlp_bias": config.bias}


def _scores(config: Config) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": config.attention_scores_scalar or config.head_size,
        "attn_logit_softcapping": config.attention_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    } | _windows(config)


def _windows(config: Config) -> dict[str, Any]:
    """Return the settings of sliding windows, without any layer that uses one; `student_hf_config` adds these layers.

    Without sliding windows, the size is `block_size`, which has no effect.
    """
    size = config.sliding_window_size or config.block_size
    return {"sliding_window": size, "layer_types": ["full_attention"] * config.n_layer}


def _falcon(config: Config) -> dict[str, Any]:
    return {
        "num_kv_heads": config.n_query_groups,
        "ffn_hidden_size": config.intermediate_size,
        "new_decoder_architecture": not config.shared_attention_norm,
        "multi_query": config.n_query_groups == 1,
        "num_ln_in_parallel_attn": None,
        "parallel_attn": True,
        "bias": config.bias,
        "alibi": False,
    }


def _qwen3_experts(config: Config) -> dict[str, Any]:
    return _bias(config) | {
        "num_experts": config.n_expert,
        "num_experts_per_tok": config.n_expert_per_token,
        "moe_intermediate_size": expert_width(config),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,  # litgpt's router always weights the chosen experts by a softmax over them
    }


def _copy_olmo2(config: Config, state_dict: dict[str, Any], weights: dict[str, Any]) -> None:
    # the norm is named norm_2 in litgpt's mapping, but post_attention_norm in its model
    renamed = {name.replace("post_attention_norm", "norm_2"): weight for name, weight in weights.items()}
    converter.copy_weights_olmo2(config, state_dict, renamed)


_llama = Family("llama", "LlamaForCausalLM", converter.copy_weights_llama, _bias, expresses=_ROPE)
_qwen3 = dataclasses.replace(
    _llama, model_type="qwen3", architecture="Qwen3ForCausalLM", copy_weights=converter.copy_weights_qwen_3
)
_gemma2 = Family(
    "gemma2", "Gemma2ForCausalLM", converter.copy_weights_gemma_2, _scores,
    activation="hidden_activation", mixed_windows=True, expresses=(*_ROPE, *_GEMMA),
)  # fmt: skip
_neox = Family(
    "gpt_neox", "GPTNeoXForCausalLM", converter.copy_weights_gpt_neox,
    lambda config: {
        "use_parallel_residual": config.parallel_residual, "attention_bias": config.bias,
        "rotary_emb_base": config.rope_base,
    },
    norm_eps="layer_norm_eps", rotary="rotary_pct", free_heads=False, parallel_residual=None, expresses=_ROPE,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "Falcon": Family(
        "falcon", "FalconForCausalLM", converter.copy_weights_falcon, _falcon, norm_eps="layer_norm_epsilon",
        activation="activation", free_heads=False, parallel_residual=True, expresses=_ROPE,
    ),
    "GPT-NeoX": _neox,
    "Gemma": Family(
        "gemma", "GemmaForCausalLM", converter.copy_weights_llama, _bias, activation="hidden_activation",
        expresses=_ROPE,
    ),
    "Gemma 2": _gemma2,
    "Gemma 3": dataclasses.replace(
        _gemma2, model_type="gemma3_text", architecture="Gemma3ForCausalLM",
        copy_weights=converter.copy_weights_gemma_3,
    ),
    "Llama": _llama,
    "Mistral": dataclasses.replace(
        _llama, model_type="mistral", architecture="MistralForCausalLM", expresses=(*_ROPE, "sliding_window_size"),
        facts=lambda config: {"sliding_window": config.sliding_window_size},
    ),
    "Mixtral": dataclasses.replace(
        _llama, model_type="mixtral", architecture="MixtralForCausalLM",
        facts=lambda config: {
            "num_local_experts": config.n_expert, "num_experts_per_tok": config.n_expert_per_token,
            "sliding_window": None,
        },
    ),
    "OLMo": dataclasses.replace(
        _llama, model_type="olmo", architecture="OlmoForCausalLM", norm_eps=None,
        facts=lambda config: _bias(config) | {"clip_qkv": None},
    ),
    "OLMo 2": dataclasses.replace(
        _llama, model_type="olmo2", architecture="Olmo2ForCausalLM", copy_weights=_copy_olmo2
    ),
    "Phi": Family(
        "phi", "PhiForCausalLM", converter.copy_weights_phi, lambda config: {"qk_layernorm": False},
        norm_eps="layer_norm_eps", rotary="partial_rotary_factor",
        parallel_residual=True, expresses=(*_ROPE, "lm_head_bias"),
    ),
    "Phi 3 and 4": Family(
        "phi3", "Phi3ForCausalLM", converter.copy_weights_phi,
        lambda config: {
            "sliding_window": config.sliding_window_size, "original_max_position_embeddings": config.block_size
        },
        rotary="partial_rotary_factor", expresses=("sliding_window_size",),
    ),
    "Qwen 2.5": dataclasses.replace(
        _llama, model_type="qwen2", architecture="Qwen2ForCausalLM", copy_weights=converter.copy_weights_qwen_2_5,
        facts=lambda config: {"use_sliding_window": False},
    ),
    "Qwen 3": _qwen3,
    "Qwen 3 with experts": dataclasses.replace(
        _qwen3, model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", facts=_qwen3_experts
    ),
    "StableLM": Family(
        "stablelm", "StableLmForCausalLM", converter.copy_weights_llama,
        lambda config: {"use_qkv_bias": config.bias or config.attn_bias, "qk_layernorm": False,
                        "use_parallel_residual": False},
        norm_eps="layer_norm_eps", rotary="partial_rotary_factor", free_heads=False, expresses=_ROPE,
    ),
}  # fmt: skip
"""Families by display name"""


def family_name(config: Config) -> str:
    """Return the name of a model's family, by the rules of litgpt's converter."""
    name, low, has_experts = config.name, config.name.lower(), config.mlp_class_name == "LLaMAMoE"
    if "falcon" in name:
        return "Falcon"
    for start, family in (("gemma-2-", "Gemma 2"), ("gemma-3-", "Gemma 3"), ("olmo-2-", "OLMo 2")):
        if low.startswith(start):
            return family
    if low.startswith("phi"):
        return "Phi 3 and 4" if low.startswith(("phi-3", "phi-4")) else "Phi"
    if low.startswith(("qwen2.5", "qwq")):
        return "Qwen 2.5"
    if low.startswith("qwen3"):
        return "Qwen 3 with experts" if has_experts else "Qwen 3"
    if config.mlp_class_name == "GptNeoxMLP":
        return "GPT-NeoX"
    if has_experts:
        return "Mixtral"
    if config.mlp_class_name == "GemmaMLP":
        return "Gemma"
    if config.norm_class_name == "LayerNorm":
        return "OLMo" if "OLMo" in name else "StableLM"
    return "Llama" if config.sliding_window_size is None else "Mistral"


def shares_channels(config: Config) -> bool:
    """Return whether n_head · head_size = n_embd, and the model's class in `transformers` requires it."""
    return not FAMILIES[family_name(config)].free_heads and config.n_head * config.head_size == config.n_embd


def filled_heads(config: Config) -> tuple[int, int] | None:
    """Return the numbers of query groups and heads per group after adding heads of zeros to fill the channels.

    Returns:
        None if `n_embd` is not a multiple of the head size, or too small for the model's heads.
    """
    n_head, rest = divmod(config.n_embd, config.head_size)
    groups = config.n_query_groups
    per_group = config.n_head // groups
    if rest or n_head < config.n_head:
        return None
    # zero heads with keys of their own get no gradient; Falcon with a single head counts as multi-query attention
    if per_group == 1 and (groups > 1 or family_name(config) != "Falcon"):
        return n_head, 1
    wider = (n for n in range(groups, n_head + 1) if n_head % n == 0 and n_head // n >= per_group)
    return next(((n, n_head // n) for n in wider), None)


def check_expressible(config: Config) -> Family:
    """Return the family of a model, after checking that its class in `transformers` can express the model.

    Raises:
        UserError: If the class cannot. `fit_heads` (`hf/padded.py`) checks the number of heads instead.
    """
    name = family_name(config)
    family = FAMILIES[name]
    for setting, usual in _RARE.items():
        value = getattr(config, setting)
        if value != usual and setting not in family.expresses:
            raise _refusal(name, f"{setting} = {usual}", value)
    if family.parallel_residual not in (None, config.parallel_residual):
        raise _refusal(name, f"parallel_residual = {family.parallel_residual}", config.parallel_residual)
    if family.rotary is None and config.rope_n_elem != config.head_size:
        raise _refusal(name, "rotary_percentage = 1.0", config.rotary_percentage)
    if family.norm_eps is None and config.norm_eps != 1e-5:
        raise _refusal(name, "norm_eps = 1e-5", config.norm_eps)
    if name == "GPT-NeoX" and config.n_query_groups != config.n_head:
        raise _refusal(name, "n_query_groups = n_head", f"{config.n_query_groups} and {config.n_head}")
    if "beta_fast" in (config.rope_adjustments or {}):
        raise _refusal(name, "rope_adjustments without YaRN, which differs from litgpt's", config.rope_adjustments)
    if config.rope_adjustments and config.rope_condense_ratio != 1:
        raise _refusal(name, "either rope_adjustments or rope_condense_ratio", "both")
    windows = config.sliding_window_indices or []
    if config.sliding_window_size is not None and not all(windows) and not family.mixed_windows:
        raise _refusal(name, "a sliding window in all layers or none", windows)
    return family


def _refusal(name: str, rule: str, value: Any) -> UserError:
    return UserError(
        f"transformers cannot load this model: its class {FAMILIES[name].architecture} needs {rule}, got {value}; use "
        "the checkpoint in litgpt only"
    )
