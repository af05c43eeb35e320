"""Export a litgpt checkpoint as a Hugging Face model directory with the same outputs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from litgpt.config import Config
from litgpt.tokenizer import Tokenizer

from litgpt_whittle.checkpoint import check_checkpoint, has_tokenizer, load_model, read_hf_config, read_weights
from litgpt_whittle.errors import UserError
from litgpt_whittle.families import (
    Family,
    check_expressible,
    filled_heads,
)
from litgpt_whittle.files import check_space, new_folder, write_text
from litgpt_whittle.huggingface_config import (
    expert_width,
    student_hf_config,
    text_part,
)
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.quantities import parse_amount
from litgpt_whittle.subnet import SubNet, read_choice
from litgpt_whittle.supergpt import Weights, fill_up, is_tied
from litgpt_whittle.tokenizer_files import copy_tokenizer

_STALE = (
    "rope_parameters",
    "rope_scaling",
    "dtype",
    "auto_map",
    "quantization_config",
    "_name_or_path",
    "_commit_hash",
)
"""Settings of the teacher's `config.json` to drop, because they are set again or invalid for the student"""

_CHECKED_TOKENS = 64
_TOLERANCE = 1e-3
"""Tolerance relative to the largest logit. Rounding stays below 1e-4; a wrong activation, norm or rotary setting does
not"""


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    family: Family
    n_params: int
    """Number of parameters, including padding"""
    zero_heads: int
    """Number of zero heads added per layer, so that n_head · head_size equals n_embd"""
    needs_eager_experts: bool
    """True if transformers' default implementation of experts cannot run the model"""
    difference: float | None
    """Largest difference of a logit from litgpt's, relative to the largest logit; `None` if not checked"""


def export_hf(checkpoint_dir: Path, out_dir: Path, max_shard_size: int | str = "5GB", check: bool = True) -> Exported:
    """Write a Hugging Face directory atomically, replacing an older one.

    Args:
        checkpoint_dir: A litgpt checkpoint. The layers of a layer-wise student are padded with zeros.
        out_dir: The output directory.
        max_shard_size: Maximum size of a weights file: a number of bytes, or a text such as "5GB".
        check: If true, load the directory with `transformers` and compare the logits of random tokens with litgpt's.

    Raises:
        UserError: If the checkpoint cannot be read or converted by litgpt, if the model's class in `transformers`
            cannot express it, if the disk is full, or if the check finds a difference.
    """
    n_bytes = int(parse_amount(max_shard_size, "bytes"))
    config = check_checkpoint(checkpoint_dir)
    family = check_expressible(config)
    shape = fit_heads(config, family)
    original = read_hf_config(checkpoint_dir)
    weights: Mapping[str, torch.Tensor] = read_weights(checkpoint_dir)
    dtype, tied = weights["lm_head.weight"].dtype, is_tied(weights)
    count = n_params(shape.teacher, SubNet.full(shape.teacher), tied)
    check_space(out_dir, count * dtype.itemsize, "the exported model")
    if shape.teacher is not config:
        weights = fill_up(shape, weights)
    content = hf_content(original, shape.teacher, family, tied, dtype) | _special_tokens(checkpoint_dir, original)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out_dir) as folder:
        copy_tokenizer(checkpoint_dir, folder, for_litgpt=False)
        write_text(folder / "config.json", json.dumps(content, indent=2))
        write_text(folder / "README.md", model_card(config, count, _provenance(checkpoint_dir)))
        save_torch_state_dict(hf_weights(shape.teacher, family, weights, tied), folder, max_shard_size=n_bytes)
        for file in folder.glob("*.safetensors"):  # safetensors makes its files readable by the user only
            shutil.copymode(folder / "config.json", file)
        del weights
        difference = _difference(checkpoint_dir, folder, config) if check else None
    zero_heads = shape.teacher.n_head - config.n_head
    return Exported(family, count, zero_heads, _needs_eager_experts(config, dtype), difference)


def _needs_eager_experts(config: Config, dtype: torch.dtype) -> bool:
    """Return whether rows of the experts' weights are not multiples of 16 bytes, which grouped matrix products need."""
    widths = (config.n_embd, expert_width(config))
    return config.mlp_class_name == "LLaMAMoE" and any(width * dtype.itemsize % 16 for width in widths)


def fit_heads(config: Config, family: Family) -> SubNet:
    """Return the model as a sub-network of a larger model whose head size its class in `transformers` permits.

    Some classes fix the head size to `n_embd / n_head`. If the model has fewer heads than that, zero heads are added,
    which do not change the outputs.

    Raises:
        UserError: If zero heads cannot fill the channels.
    """
    n_embd, size, groups = config.n_embd, config.head_size, config.n_query_groups
    if family.free_heads or config.n_head * size == n_embd:
        return SubNet.full(config)
    if (filled := filled_heads(config)) is None:
        raise UserError(
            f"{family.architecture} of transformers has heads of n_embd / n_head dimensions, got n_embd = {n_embd}, "
            f"n_head = {config.n_head} and head_size = {size}; keep n_embd at a multiple of {size} and at most "
            f"n_embd / {size} heads, as --search_space.convertible and --search_space.fixed '[head_size, n_embd]' do"
        )
    wider = dataclasses.replace(config, n_head=n_embd // size, n_query_groups=filled[0])
    return SubNet(wider, n_query_groups=groups, heads_per_group=config.n_head // groups)


def hf_content(
    original: dict[str, Any], config: Config, family: Family, tied: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the content of a model's `config.json`, in a layout that both `transformers` 4 and 5 read.

    Args:
        original: Content of the teacher's `config.json`; empty if unknown. Settings of litgpt's config take precedence.
        config: litgpt's config.
        family: The model's family.
        tied: True if the LM head is tied to the embedding.
        dtype: The weights' data type.
    """
    content = {key: value for key, value in text_part(original).items() if key not in _STALE}
    gelu = "gelu_pytorch_tanh" if config.gelu_approximate == "tanh" else "gelu"
    content |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        family.activation: gelu if config.mlp_class_name in ("GptNeoxMLP", "GemmaMLP") else "silu",
        "max_position_embeddings": config.block_size,
        "vocab_size": config.padded_vocab_size,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family.norm_eps:
        content[family.norm_eps] = config.norm_eps
    if family.rotary:
        content[family.rotary] = config.rotary_percentage
    if family.free_heads:
        content["head_dim"] = config.head_size
    if scaling := _rope_scaling(config):
        content["rope_scaling"] = scaling
    return student_hf_config(content | family.facts(config), config)


def _rope_scaling(config: Config) -> dict[str, Any] | None:
    adjustments = config.rope_adjustments or {}
    if "low_freq_factor" in adjustments:
        return {
            "rope_type": "llama3",
            "factor": adjustments["factor"],
            "low_freq_factor": adjustments["low_freq_factor"],
            "high_freq_factor": adjustments["high_freq_factor"],
            "original_max_position_embeddings": adjustments["original_max_seq_len"],
        }
    factor = adjustments.get("factor", config.rope_condense_ratio)
    return None if factor == 1 else {"rope_type": "linear", "factor": float(factor)}


def hf_weights(config: Config, family: Family, weights: Mapping[str, torch.Tensor], tied: bool) -> Weights:
    """Return a model's weights, renamed for `transformers` by litgpt's mapping; a tied LM head is left out.

    Raises:
        UserError: If litgpt's mapping lacks one of the weights.
    """
    converted: Weights = {}
    try:
        family.copy_weights(config, converted, dict(weights))
    except (KeyError, NotImplementedError) as error:
        raise UserError(
            f"litgpt's converter does not support {family.architecture} with "
            f"{error.args[0] if error.args else 'such norms'}, as {config.name!r} has; use the checkpoint in litgpt"
        ) from None
    head = "embed_out.weight" if "embed_out.weight" in converted else "lm_head.weight"
    if tied:
        converted.pop(head, None)
    else:
        # litgpt leaves out the head in families that mostly tie it, though a student may have untied it
        converted.setdefault(head, weights["lm_head.weight"])
    # safetensors rejects views of a larger tensor, such as the queries, keys and values here
    return {
        name: part if part.untyped_storage().nbytes() == part.nbytes else part.clone()
        for name, part in converted.items()
    }


def _special_tokens(checkpoint_dir: Path, original: Mapping[str, Any]) -> dict[str, Any]:
    """Return BOS, EOS and padding ids if there is no `config.json`; the vocabulary may lack the class's default ids."""
    if original:
        return {}
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if has_tokenizer(checkpoint_dir):
        tokenizer = Tokenizer(checkpoint_dir)
        ids |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return ids


@torch.inference_mode()
def _difference(checkpoint_dir: Path, folder: Path, config: Config) -> float:
    """Return the largest difference between the exported model's logits and litgpt's, relative to the largest logit.

    Both models run in float32.

    Raises:
        UserError: If `transformers` does not load the model correctly, or the difference exceeds `_TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(config.vocab_size, (1, min(_CHECKED_TOKENS, config.block_size)), generator=generator)
    expected = load_model(checkpoint_dir, dtype=torch.float32)(idx)  # (1, T, V)
    difference = _open(folder)(idx).logits.sub_(expected).abs().max().item() / expected.abs().max().item()
    if not difference <= _TOLERANCE:
        raise UserError(
            f"the exported model's logits differ from litgpt's by {difference:.1e} of the largest, so nothing was "
            "exported; the checkpoint's model_config.yaml has a setting that its class in transformers does not support"
        )
    return difference


def _open(folder: Path) -> torch.nn.Module:
    """Load the exported model in float32.

    Raises:
        UserError: If `transformers` cannot load it, or reports missing, unexpected or mismatched weights.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", local_files_only=True
        )
        model, info = opened
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # see `_needs_eager_experts`
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise UserError(f"transformers does not open the exported model ({reason}), so nothing was exported") from error
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise UserError(
                f"transformers reports {kind.replace('_', ' ')} in the exported model, such as {min(info[kind])}, so "
                "nothing was exported; the checkpoint's model_config.yaml has a setting that its class does not support"
            )
    return model.float().eval()


def model_card(config: Config, n_params: int, provenance: Mapping[str, Any]) -> str:
    """Return a short model card."""
    lines = ["---", "library_name: transformers", "---", f"# {config.name}", ""]
    lines.append(f"{n_params:,} parameters, {config.n_layer} layers, {config.n_embd} channels.")
    if {"teacher", "n_params", "n_params_teacher"} <= provenance.keys():
        share = f"{provenance['n_params']:,} of its {provenance['n_params_teacher']:,} parameters"
        lines.append(f"A sub-network of {provenance['teacher']}, cut out of it with {share} by litgpt_whittle.")
    return "\n".join([*lines, ""])


def _provenance(checkpoint_dir: Path) -> dict[str, Any]:
    path = checkpoint_dir / "sub_network.yaml"
    return (read_choice(path).get("provenance") or {}) if path.is_file() else {}
