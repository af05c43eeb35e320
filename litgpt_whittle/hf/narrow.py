"""Remove the padding of a layer-wise Llama from a GGUF file.

llama.cpp's architecture `llama` has equal layers. Its architecture `deci` is the same model with sizes for each layer,
and takes the same tensors. llama.cpp's converter writes it only with heads of `n_embd / n_head` dimensions, MLPs of a
multiple of 256 neurons, and a tokenizer like Llama 2's or of 128,256 tokens, so the padded file is rewritten here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_whittle.subnet import SubNet

_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
"""Settings that get one entry per layer"""

_ZERO_NEURONS = 32
"""Neurons of an MLP that the student lacks, which output zero: a layer without an MLP loses its attention in `deci`"""


def narrow_layers(file: Path, shape: SubNet) -> int:
    """Rewrite the GGUF file of a padded Llama with layers in their true shapes.

    Args:
        file: A file of the architecture `llama`, with matrices in a type of 16 or 32 bits. It is replaced.
        shape: The true shape, as a sub-network of the padded config; each layer keeps its first units.

    Returns:
        The number of stored parameters.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader, beside = GGUFReader(file), file.with_name(f".{file.name}")
    writer = GGUFWriter(beside, "deci")
    layers = [_Layer(shape, i) for i in range(len(shape))]
    for name, field in reader.fields.items():
        setting = name.removeprefix("llama.")
        if name.startswith("GGUF.") or name in ("general.architecture", "general.size_label"):
            continue  # the writer sets them, or they hold for the padded model
        if setting in _PER_LAYER:
            writer.add_array(f"deci.{setting}", [layer.settings[setting] for layer in layers])
            continue
        sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        name = name if setting == name else f"deci.{setting}"
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    n_stored = 0
    for tensor in reader.tensors:
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        data = layers[int(found[1])].narrow(found[2], tensor.data) if found else tensor.data
        if data is not None:
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
            n_stored += 0 if tensor.name == "rope_freqs.weight" else _n_numbers(data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(beside, file)
    return n_stored


def _n_numbers(data: np.ndarray[Any, Any]) -> int:
    """Return the number of entries of a tensor's data, in which bfloat16 is pairs of bytes."""
    return data.size // 2 if data.dtype == np.uint8 else data.size


class _Layer:
    """Sizes of a layer, and the rows and columns of the padded matrices that belong to it."""

    def __init__(self, shape: SubNet, index: int) -> None:
        config = shape.teacher
        groups, per_group, neurons, _ = shape.layer(index).sizes
        padded_per_group = config.n_head // config.n_query_groups
        neurons = neurons or min(_ZERO_NEURONS, config.intermediate_size)
        heads = (np.arange(groups)[:, None] * padded_per_group + np.arange(per_group)).ravel()
        query = (heads[:, None] * config.head_size + np.arange(config.head_size)).ravel()
        key, mlp = np.arange(groups * config.head_size), np.arange(neurons)
        self.settings = dict(zip(_PER_LAYER, (len(heads), groups, neurons)))
        self._rows = {"attn_q": query, "attn_k": key, "attn_v": key, "ffn_gate": mlp, "ffn_up": mlp}
        self._columns = {"attn_output": query, "ffn_down": mlp}

    def narrow(self, name: str, data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """Return the layer's part of a padded matrix; other tensors are returned as they are.

        The tensors of an attention that the student lacks are None.

        Args:
            name: Name of the tensor within the layer.
            data: Its data, shape (rows, columns); bfloat16 as pairs of bytes.
        """
        if name.startswith("attn_") and not self.settings["attention.head_count"]:
            return None
        if name in self._rows:
            return data[self._rows[name]]
        if name in self._columns:
            is_bfloat16 = data.dtype == np.uint8
            numbers = data.view(np.uint16) if is_bfloat16 else data
            return np.ascontiguousarray(numbers[:, self._columns[name]]).view(data.dtype)
        return data
