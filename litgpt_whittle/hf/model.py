"""A model in the layout of `transformers`: content of its `config.json`, and names of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from litgpt.tokenizer import Tokenizer

from litgpt_whittle.checkpoint import has_tokenizer
from litgpt_whittle.errors import UserError
from litgpt_whittle.families import Family
from litgpt_whittle.hf.student import Student
from litgpt_whittle.huggingface_config import student_hf_config, text_part
from litgpt_whittle.supergpt import Weights

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


@dataclass(frozen=True)
class HFModel:
    """A model that is ready to be written as a Hugging Face directory."""

    content: dict[str, Any]
    """Content of `config.json`"""
    weights: Callable[[], Weights]
    """Returns the weights under the names of `transformers`"""
    n_params: int
    """Number of stored parameters"""
    model_class: Callable[[], Any]
    """Returns the class whose `from_pretrained` opens the directory"""
    code: tuple[Path, ...] = ()
    """Python files to copy into the directory, for `trust_remote_code=True`"""
    notes: tuple[str, ...] = ()
    """Notes for users of the directory, one sentence each"""

    @property
    def architecture(self) -> str:
        """Name of the class with a language-modelling head."""
        return self.content["architectures"][0]


def hf_content(student: Student, config: Config, family: Family) -> dict[str, Any]:
    """Return the content of a model's `config.json`, in a layout that both `transformers` 4 and 5 read.

    Args:
        student: The student, whose teacher's `config.json` is the start. Settings of litgpt's config take precedence.
        config: litgpt's config of the exported model.
        family: The model's family.
    """
    content = {key: value for key, value in text_part(student.hf_config).items() if key not in _STALE}
    gelu = "gelu_pytorch_tanh" if config.gelu_approximate == "tanh" else "gelu"
    content |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        family.activation: gelu if config.mlp_class_name in ("GptNeoxMLP", "GemmaMLP") else "silu",
        "max_position_embeddings": config.block_size,
        "vocab_size": config.padded_vocab_size,
        "tie_word_embeddings": student.tied,
        "torch_dtype": str(student.dtype).removeprefix("torch."),
    }
    if family.norm_eps:
        content[family.norm_eps] = config.norm_eps
    if family.rotary:
        content[family.rotary] = config.rotary_percentage
    if family.free_heads:
        content["head_dim"] = config.head_size
    if scaling := _rope_scaling(config):
        content["rope_scaling"] = scaling
    return student_hf_config(content | family.facts(config), config) | _special_tokens(student)


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


def _special_tokens(student: Student) -> dict[str, Any]:
    """Return BOS, EOS and padding ids if there is no `config.json`; the vocabulary may lack the class's default ids."""
    if student.hf_config:
        return {}
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if has_tokenizer(student.checkpoint_dir):
        tokenizer = Tokenizer(student.checkpoint_dir)
        ids |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return ids


def hf_weights(config: Config, family: Family, weights: Mapping[str, torch.Tensor]) -> Weights:
    """Return weights under the names of `transformers`, by litgpt's mapping; an LM head keeps litgpt's name.

    Args:
        config: litgpt's config of the weights.
        family: The model's family.
        weights: Weights of a model, or of some of its modules.

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
    return converted


def with_head(converted: Weights, head: torch.Tensor, tied: bool) -> Weights:
    """Return weights as `transformers` stores them: with the LM head, unless it is tied, and without shared memory.

    Args:
        converted: The output of `hf_weights`.
        head: The LM head.
        tied: True if the head is tied to the embedding.
    """
    name = "embed_out.weight" if "embed_out.weight" in converted else "lm_head.weight"
    if tied:
        converted.pop(name, None)
    else:
        # litgpt leaves out the head in families that mostly tie it, though a student may have untied it
        converted.setdefault(name, head)
    # safetensors rejects views of a larger tensor, such as the queries, keys and values here
    return {
        name: part if part.untyped_storage().nbytes() == part.nbytes else part.clone()
        for name, part in converted.items()
    }
