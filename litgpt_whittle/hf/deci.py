"""A Llama whose layers differ in width, without padding: `DeciLMForCausalLM`, the format of NVIDIA's Llama-Nemotron.

`block_configs` in `config.json` has the sizes of each layer. vLLM (`nemotron_nas.py`), TensorRT-LLM, SGLang and
llama.cpp's converter (`deci.py`) read it; all of them compute the neurons of a layer from its `ffn_mult` by
`int(2 * ffn_mult * hidden_size / 3)`, rounded up to a multiple of 256.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from litgpt_whittle.errors import UserError
from litgpt_whittle.families import FAMILIES, check_expressible, family_name
from litgpt_whittle.hf.model import HFModel, hf_content, hf_weights, with_head
from litgpt_whittle.hf.student import Student
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import Weights, unpad

ARCHITECTURE = "DeciLMForCausalLM"

_STEP = 256
"""Neurons of an MLP are a multiple of this"""

_CODE = tuple(Path(__file__).parent / "decilm" / name for name in ("configuration_decilm.py", "modeling_decilm.py"))


def deci_model(student: Student) -> HFModel:
    """Return a student in its true shape as a `DeciLMForCausalLM`.

    Raises:
        UserError: If the student is not a Llama, or if the format cannot express one of its layers.
    """
    check_deci(student.shape)
    first = student.shape.layer_config(0)  # its number of query heads is that of all layers
    config = dataclasses.replace(first, intermediate_size=student.config.intermediate_size)
    content = hf_content(student, config, FAMILIES["Llama"]) | {
        "architectures": [ARCHITECTURE],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": f"modeling_decilm.{ARCHITECTURE}",
        },
        "block_configs": [_block(student.shape, i) for i in range(len(student.shape))],
    }
    return HFModel(
        content=content,
        weights=lambda: _weights(student),
        n_params=student.n_params,
        model_class=_deci_class,
        code=_CODE,
        notes=("Open it with trust_remote_code=True: transformers has no class of its own for it.",),
    )


def check_deci(shape: SubNet) -> None:
    """Check that the format can express a student.

    Raises:
        UserError: For the first rule that it breaks.
    """
    config = shape.teacher
    check_expressible(config)
    if (name := family_name(config)) != "Llama":
        raise UserError(
            f"{ARCHITECTURE} has the layers of a Llama, got {config.name!r}, which is a {name}; use --format hf, "
            "which pads the layers"
        )
    sizes = [shape.layer(i).sizes for i in range(len(shape))]
    heads = [groups * per_group for groups, per_group, _, _ in sizes]
    if sizes[0][0] == 0:
        raise UserError(f"the first layer of a {ARCHITECTURE} needs attention, which vLLM expects; use --format hf")
    for i, (n_head, (_, _, neurons, _)) in enumerate(zip(heads, sizes)):
        if n_head not in (0, heads[0]):
            raise UserError(
                f"{ARCHITECTURE} has the same number of query heads in all layers, got {heads[0]} in layer 0 and "
                f"{n_head} in layer {i}; use --format hf, or search with --search_space.fixed '[head_size, "
                "n_query_groups, heads_per_group]'"
            )
        if neurons % _STEP:
            raise UserError(
                f"{ARCHITECTURE} has MLPs of a multiple of {_STEP} neurons, got {neurons} in layer {i}; use --format "
                f"hf, or search with --search_space.step.intermediate_size {_STEP}"
            )


def _block(shape: SubNet, layer: int) -> dict[str, Any]:
    """Return a layer's entry in `block_configs`."""
    groups, per_group, neurons, _ = shape.layer(layer).sizes
    return {
        "attention": {
            "n_heads_in_group": per_group if groups else None,
            "no_op": groups == 0,
            "replace_with_linear": False,
        },
        "ffn": {
            "ffn_mult": 3 * neurons / (2 * shape.teacher.n_embd) if neurons else None,
            "no_op": neurons == 0,
            "replace_with_linear": False,
        },
    }


def _weights(student: Student) -> Weights:
    """Return the weights in their true shapes, under the names of a Llama."""
    family, shape = FAMILIES["Llama"], student.shape
    true = unpad(shape, student.weights)
    converted: Weights = {}
    for i in range(len(shape)):
        prefix = f"transformer.h.{i}."
        layer = {name: true.pop(name) for name in list(true) if name.startswith(prefix)}
        converted |= hf_weights(shape.layer_config(i), family, layer)
    converted |= hf_weights(shape.teacher, family, true)
    return with_head(converted, true["lm_head.weight"], student.tied)


def _deci_class() -> Any:
    from litgpt_whittle.hf.decilm.modeling_decilm import DeciLMForCausalLM

    return DeciLMForCausalLM
