"""Tiny configs of every distinct architecture in litgpt's own table; a new litgpt adds cases automatically."""

import dataclasses
from collections.abc import Collection
from typing import Any

import hypothesis.strategies as st
import pytest
from litgpt.config import Config, configs

from litgpt_whittle.errors import UserError
from litgpt_whittle.rope import legal_head_sizes
from litgpt_whittle.subnet import DROPS, SubNet, layer_sizes
from litgpt_whittle.unit_index import UnitIndex

SIZES = {
    "name", "hf_config", "block_size", "n_layer", "n_embd", "vocab_size", "padding_multiple", "padded_vocab_size",
    "n_head", "head_size", "n_query_groups", "intermediate_size", "moe_intermediate_size", "norm_eps", "rope_base",
    "attention_scores_scalar", "n_expert", "n_expert_per_token", "rope_local_base_freq", "rope_condense_ratio",
}  # fmt: skip
"""Fields that set only sizes, not the kind of architecture"""


def _kind(config: Config) -> tuple:
    """Return the settings that distinguish two architectures."""
    kind = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in SIZES:
            value = value is None
        elif field.name in ("sliding_window_indices", "rope_indices"):
            value = None if value is None else (value[0], len(set(value)))
        elif field.name == "sliding_window_size":
            value = value is None
        elif field.name == "rope_adjustments":
            value = value and tuple(sorted(value))
        kind.append((field.name, value))
    groups = min(config.n_query_groups, 2), config.n_query_groups == config.n_head
    # litgpt chooses norms by the model's name
    return (*kind, groups, config.n_expert > 0, "Gemma" in config.name, "OLMo" in config.name)


def _tiny(config: dict) -> Config:
    full = Config(**config)
    is_mha, is_mqa = full.n_query_groups == full.n_head, full.n_query_groups == 1
    n_layer = 8 if full.rope_local_base_freq else 4  # Gemma 3 attends globally in every sixth layer
    changes = dict(
        block_size=24,
        n_layer=n_layer,
        n_embd=32,
        vocab_size=61,
        padding_multiple=8,
        padded_vocab_size=64,
        n_head=4,
        n_query_groups=4 if is_mha else 1 if is_mqa else 2,
        head_size=16,
        intermediate_size=24,
    )
    if full.moe_intermediate_size is not None:
        changes["moe_intermediate_size"] = 20
    if full.n_expert:
        changes |= {"n_expert": 4, "n_expert_per_token": 2}
    if full.sliding_window_size is not None:
        changes |= {"sliding_window_size": 5, "sliding_window_indices": full.sliding_window_indices[:n_layer]}
    if full.rope_indices is not None:
        changes["rope_indices"] = full.rope_indices[:n_layer]
    if full.attention_scores_scalar is not None:
        changes["attention_scores_scalar"] = 16
    return Config(**{**config, **changes})


LATENT = dict(
    name="latent", block_size=24, n_layer=4, n_embd=32, vocab_size=61, padded_vocab_size=64, n_head=4,
    intermediate_size=24, moe_intermediate_size=12, norm_class_name="RMSNorm", bias=False, parallel_residual=False,
    mlp_class_name="LLaMAMoE", n_expert=8, n_shared_expert=2, n_expert_groups=2, n_topk_groups=1,
    n_topk_scores_per_group=2, n_expert_per_token=2, first_k_dense_replace=2, routed_scaling_factor=2.5,
    norm_topk_prob=True, rope_interleave=True,
    latent_attention=dict(q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8),
)  # fmt: skip
"""Latent attention and grouped experts, which litgpt can build but no config in its table uses yet"""

INTERLEAVED = dict(
    name="interleaved", block_size=24, n_layer=4, n_embd=32, vocab_size=61, padded_vocab_size=64, n_head=4,
    head_size=16, n_query_groups=2, intermediate_size=24, rope_interleave=True, rotary_percentage=0.75, attn_bias=True,
)  # fmt: skip
YARN = dict(
    name="yarn", block_size=24, n_layer=4, n_embd=32, vocab_size=61, padded_vocab_size=64, n_head=4, head_size=16,
    n_query_groups=2, intermediate_size=24, rotary_percentage=1.0, bias=False, norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP", parallel_residual=False,
    rope_adjustments=dict(
        factor=4.0, beta_fast=32.0, beta_slow=1.0, original_max_seq_len=8, mscale=1.0, mscale_all_dim=0.7
    ),
)  # fmt: skip


def _architectures() -> dict[str, Config]:
    found = {}
    for config in configs:
        found.setdefault(_kind(Config(**config)), config)
    tiny = {config["name"]: _tiny(config) for config in found.values()}
    return tiny | {config["name"]: Config(**config) for config in (LATENT, INTERLEAVED, YARN)}


ARCHITECTURES = _architectures()
"""Tiny configs by name"""

KINDS = ("Llama-3.1-8B", "Gemma-3-1b-it", "phi-2", "Mixtral-8x7B-v0.1", "latent")
KINDS = {name: ARCHITECTURES[name] for name in KINDS}
"""One config of each kind, for tests that hardly depend on the architecture"""


def sweep(cases: dict[str, Any], fast: Collection[str] = KINDS) -> pytest.MarkDecorator:
    """Return a parametrisation over all cases as `config`; those that are not among the fast ones are marked slow."""
    params = [
        pytest.param(case, id=name, marks=() if name in fast else pytest.mark.slow) for name, case in cases.items()
    ]
    return pytest.mark.parametrize("config", params)


@st.composite
def keeps(draw, size: int, least: int = 1) -> UnitIndex:
    """Draw at least `least` of `size` units: the first ones or any set."""
    n = draw(st.integers(least, size))
    if draw(st.booleans()):
        return UnitIndex(n)
    return UnitIndex(sorted(draw(st.permutations(range(size)))[:n]))


@st.composite
def experts(draw, teacher: Config, n: int) -> UnitIndex:
    if not teacher.n_expert_groups or draw(st.booleans()):
        return (
            UnitIndex(sorted(draw(st.permutations(range(teacher.n_expert)))[:n]))
            if not teacher.n_expert_groups
            else UnitIndex(n)
        )
    size = teacher.n_expert // teacher.n_expert_groups
    chosen = [
        g * size + i
        for g in range(teacher.n_expert_groups)
        for i in draw(st.permutations(range(size)))[: n // teacher.n_expert_groups]
    ]
    return UnitIndex(sorted(chosen))


@st.composite
def drops(draw, layers: list[int]) -> dict[str, UnitIndex]:
    """Draw which layers lack their attention or their MLP; one of at least two layers keeps each of them."""
    what = {layer: draw(st.sampled_from(["", *DROPS])) for layer in layers}
    chosen = {name: [layer for layer in layers if what[layer] == name][: len(layers) - 1] for name in DROPS}
    return {name: UnitIndex(own) for name, own in chosen.items() if own}


@st.composite
def subnets(draw, teacher: Config, uniform: bool | None = None, sublayers: bool = False) -> SubNet:
    """Draw any legal sub-network of a teacher; with `uniform`, one of the same sizes in all layers, or possibly not.

    With `sublayers`, one of different sizes may lack the attention or the MLP of some layers.
    """
    n_layer = draw(keeps(teacher.n_layer))
    layers = n_layer.indices.tolist()
    uniform = draw(st.booleans()) if uniform is None else uniform
    choice: dict = {"n_embd": draw(keeps(teacher.n_embd, 2)), "n_layer": n_layer}
    choice["head_size"] = draw(st.sampled_from(legal_head_sizes(teacher)))
    least = max(teacher.n_expert_per_token, (teacher.n_expert_groups or 1) * (teacher.n_topk_scores_per_group or 1))
    step = teacher.n_expert_groups or 1
    n_expert = draw(st.sampled_from(range(least, teacher.n_expert + 1, step))) if teacher.n_expert else 0
    for field in ("n_query_groups", "heads_per_group", "intermediate_size", "moe_intermediate_size", "n_expert"):
        sizes = [layer_sizes(teacher, layer).get(field) for layer in layers]
        if all(size is None for size in sizes):
            continue
        if field == "n_expert":
            choice[field] = [None if size is None else draw(experts(teacher, n_expert)) for size in sizes]
        elif uniform:
            choice[field] = draw(keeps(next(size for size in sizes if size is not None)))
        else:
            choice[field] = [None if size is None else draw(keeps(size)) for size in sizes]
    if sublayers and not uniform and len(layers) > 1 and draw(st.booleans()):
        choice |= draw(drops(layers))
    try:
        return SubNet(teacher, **choice)
    except UserError as error:  # the strategy itself must draw only legal ones
        raise AssertionError(f"drew an illegal sub-network: {error}") from error
