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


def narrow_layers(file: Path, shape: SubNet) -> None:
    """Rewrite the GGUF file of a padded Llama with layers in their true shapes.

    A sub-layer that the student lacks keeps its padding, which outputs zero: in `deci`, a layer without an MLP would
    lose its attention as well.

    Args:
        file: A file of the architecture `llama`, with matrices in a type of 16 or 32 bits. It is replaced.
        shape: The true shape, as a sub-network of the padded config; each layer keeps its first units.
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
    for tensor in reader.tensors:
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        data = layers[int(found[1])].narrow(found[2], tensor.data) if found else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(beside, file)


class _Layer:
    """Sizes of a layer, and the rows and columns of the padded matrices that belong to it."""

    def __init__(self, shape: SubNet, index: int) -> None:
        config = shape.teacher
        groups, per_group, neurons, _ = shape.layer(index).sizes
        padded_per_group = config.n_head // config.n_query_groups
        groups, per_group = groups or config.n_query_groups, per_group or padded_per_group
        neurons = neurons or config.intermediate_size
        heads = (np.arange(groups)[:, None] * padded_per_group + np.arange(per_group)).ravel()
        query = (heads[:, None] * config.head_size + np.arange(config.head_size)).ravel()
        key, mlp = np.arange(groups * config.head_size), np.arange(neurons)
        self.settings = dict(zip(_PER_LAYER, (len(heads), groups, neurons)))
        self._rows = {"attn_q": query, "attn_k": key, "attn_v": key, "ffn_gate": mlp, "ffn_up": mlp}
        self._columns = {"attn_output": query, "ffn_down": mlp}

    def narrow(self, name: str, data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the layer's part of a padded matrix; other tensors are returned as they are.

        Args:
            name: Name of the tensor within the layer.
            data: Its data, shape (rows, columns); bfloat16 as pairs of bytes.
        """
        if name in self._rows:
            return data[self._rows[name]]
        if name in self._columns:
            is_bfloat16 = data.dtype == np.uint8
            numbers = data.view(np.uint16) if is_bfloat16 else data
            return np.ascontiguousarray(numbers[:, self._columns[name]]).view(data.dtype)
        return data
