"""Test `litgpt export --format gguf`: how the converter is called, its errors, and the removal of padding.

Slow tests run llama.cpp's own converter and library, where both are installed.
"""

import dataclasses
import json
import re
import shutil
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from litgpt.utils import CLI
from test_deci import LAYERWISE, TEACHER, WIDE, save_student
from test_export import IDX
from texts import write_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.commands.export import setup
from litgpt_whittle.errors import UserError
from litgpt_whittle.families import FAMILIES
from litgpt_whittle.hf import gguf as gguf_export
from litgpt_whittle.hf.model import hf_weights
from litgpt_whittle.hf.narrow import narrow_layers
from litgpt_whittle.hf.padded import padded_model
from litgpt_whittle.hf.student import Student

CONVERTER = shutil.which("convert_hf_to_gguf.py")
UNEQUAL = LAYERWISE | {"intermediate_size": [500, "0-127,300-427", 9], "n_query_groups": [1, 4, 3]}
"""Widths and numbers of heads that differ from layer to layer"""


def write_converter(path, body):
    path.write_text("import json, pathlib, sys\n" + textwrap.dedent(body))
    return path


def test_the_converter_reads_the_exported_directory(tmp_path, capsys):
    converter = write_converter(
        tmp_path / "convert_hf_to_gguf.py",
        """
        folder = pathlib.Path(sys.argv[1])
        seen = {"arguments": sys.argv[2:], "files": sorted(path.name for path in folder.iterdir())}
        pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(json.dumps(seen))
        """,
    )
    save_student(tmp_path / "lit", TEACHER, n_layer=2)
    CLI(setup, args=[
        str(tmp_path / "lit"), "--format", "gguf", "--converter", str(converter), "--gguf_type", "f32", "--out_dir",
        str(tmp_path / "small"),
    ])  # fmt: skip
    seen = json.loads((tmp_path / "small/small.gguf").read_text())
    assert {"config.json", "model.safetensors", "README.md"} <= set(seen["files"])
    assert seen["arguments"][2:] == ["--outtype", "f32", "--model-name", TEACHER.name]
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["README.md", "small.gguf"]
    assert "llama-cli -m small.gguf" in (tmp_path / "small/README.md").read_text()
    printed = capsys.readouterr().out
    assert "small.gguf" in printed and "of the largest logit" in printed
    with pytest.raises(UserError, match="--overwrite true"):
        setup(tmp_path / "lit", format="gguf", converter=converter, out_dir=tmp_path / "small")
    setup(tmp_path / "lit", format="gguf", converter=converter, out_dir=tmp_path / "small", overwrite=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", "recognized.*update llama.cpp"),
        ("sys.exit(3)", "exit code 3"),
        ("", "failed"),
    ],
)
def test_a_failing_converter_is_reported_in_one_line(body, message, tmp_path):
    save_student(tmp_path / "lit", TEACHER, n_layer=1)
    converter = write_converter(tmp_path / "convert.py", body)
    with pytest.raises(UserError, match=message) as error:
        setup(tmp_path / "lit", format="gguf", converter=converter, out_dir=tmp_path / "out", check=False)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_missing_converter_is_reported_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for options, message in (
        ({"format": "gguf"}, "not on PATH; clone https://github.com/ggml-org/llama.cpp and set --converter"),
        ({"format": "gguf", "converter": tmp_path / "nowhere.py"}, "got .*nowhere.py.*check the path"),
        ({"format": "hf", "converter": tmp_path / "nowhere.py"}, "leave --converter out"),
    ):
        with pytest.raises(UserError, match=message) as error:
            setup(tmp_path / "no_checkpoint", out_dir=tmp_path / "out", **options)
        assert "\n" not in str(error.value)


def test_the_package_gguf_is_required_for_unequal_layers_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    converter = write_converter(tmp_path / "convert.py", "")
    save_student(tmp_path / "lit", TEACHER, **UNEQUAL)
    with pytest.raises(UserError, match=re.escape("pip install 'litgpt-whittle[gguf]'")):
        setup(tmp_path / "lit", format="gguf", converter=converter, out_dir=tmp_path / "out")


def test_a_tokenizer_with_more_tokens_than_the_model_is_rejected(tmp_path):
    converter = write_converter(tmp_path / "convert.py", "")
    tokenizer_dir = write_tokenizer(tmp_path / "tokenizer")
    save_student(tmp_path / "lit", TEACHER, tokenizer_dir=tokenizer_dir, n_layer=1)
    with pytest.raises(UserError, match="got [0-9]{3} tokens in the tokenizer and 64 in the model") as error:
        setup(tmp_path / "lit", format="gguf", converter=converter, out_dir=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    (tmp_path / "lit/tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="does not open the tokenizer"):
        setup(tmp_path / "lit", format="gguf", converter=converter, out_dir=tmp_path / "out")


# -- with the package gguf

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Names of modules in transformers and in GGUF"""


def gguf_name(name):
    """Return a weight's name in GGUF."""
    module = name.removesuffix(".weight")
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module):
        return f"blk.{found[1]}.{NAMES[found[2]]}.weight"
    return f"{NAMES[module]}.weight"


def numbers(tensor):
    """Return a tensor of a GGUF file in float32."""
    data = torch.from_numpy(np.array(tensor.data))
    return (data.view(torch.bfloat16) if data.dtype == torch.uint8 else data).float()


def write_padded(gguf, path, student, dtype):
    """Write a padded Llama, without the converter's permutation within heads."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_rope_freq_base(5.0)
    writer.add_head_count(student.config.n_head)
    writer.add_head_count_kv(student.config.n_query_groups)
    writer.add_feed_forward_length(student.config.intermediate_size)
    writer.add_token_list(["a", "b"])
    for name, weight in padded_model(student).weights().items():
        weight = weight.to(dtype)
        if dtype == torch.float32:
            writer.add_tensor(gguf_name(name), weight.numpy())
        else:
            raw = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), weight.view(torch.uint8).numpy(), raw_dtype=raw)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_removed_from_a_gguf_file(dtype, tmp_path):
    gguf = pytest.importorskip("gguf")
    student = Student.open(save_student(tmp_path / "lit", TEACHER, **UNEQUAL))
    write_padded(gguf, tmp_path / "x.gguf", student, dtype)
    n_stored = narrow_layers(tmp_path / "x.gguf", student.shape)

    read = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {name: field.contents() for name, field in read.fields.items()}
    heads = [n * m for n, m in zip(UNEQUAL["n_query_groups"], UNEQUAL["heads_per_group"])]
    assert fields["general.architecture"] == "deci" and fields["tokenizer.ggml.tokens"] == ["a", "b"]
    assert fields["deci.rope.freq_base"] == 5.0 and not any(name.startswith("llama.") for name in fields)
    assert fields["deci.attention.head_count"] == heads
    assert fields["deci.attention.head_count_kv"] == UNEQUAL["n_query_groups"]
    assert fields["deci.feed_forward_length"] == [500, 256, 9]
    true = load_model(tmp_path / "lit")
    found = {tensor.name: numbers(tensor) for tensor in read.tensors}
    assert sum(tensor.numel() for tensor in found.values()) == n_stored
    assert n_stored == sum(weight.numel() for weight in true.parameters())
    for i, block in enumerate(true.transformer.h):
        weights = {f"transformer.h.{i}.{name}": weight for name, weight in block.state_dict().items()}
        expected = hf_weights(student.shape.layer_config(i), FAMILIES["Llama"], weights)
        for name, weight in expected.items():
            assert torch.equal(found[gguf_name(name)], weight.to(dtype).float())


@dataclasses.dataclass
class Sizes:
    """Sizes of layers, among them sub-layers that are left out; takes the place of a sub-network."""

    teacher: object
    layers: list

    def __len__(self):
        return len(self.layers)

    def layer(self, i):
        return SimpleNamespace(sizes=self.layers[i])


def test_a_dropped_attention_has_no_tensors_and_a_dropped_mlp_a_few_zeros(tmp_path):
    gguf = pytest.importorskip("gguf")
    student = Student.open(save_student(tmp_path / "lit", TEACHER, n_layer=3))
    write_padded(gguf, tmp_path / "x.gguf", student, torch.float32)
    narrow_layers(tmp_path / "x.gguf", Sizes(student.config, [(4, 2, 300, 0), (0, 0, 768, 0), (2, 1, 0, 0)]))
    read = gguf.GGUFReader(tmp_path / "x.gguf")
    shapes = {tensor.name: tuple(tensor.shape) for tensor in read.tensors}
    assert read.fields["deci.attention.head_count"].contents() == [8, 0, 2]
    assert read.fields["deci.feed_forward_length"].contents() == [300, 768, 32]
    assert not any(name.startswith("blk.1.attn") for name in shapes)
    assert shapes["blk.1.ffn_norm.weight"] == (32,) and shapes["blk.2.ffn_down.weight"] == (32, 32)
    assert shapes["blk.0.ffn_up.weight"] == (32, 300) and shapes["blk.2.attn_output.weight"] == (32, 32)


# -- with llama.cpp


def write_llama_tokenizer(folder):
    """Write a tokenizer like Llama 2's, which llama.cpp recognises by its kind: BPE that falls back to bytes."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "he"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "t"), ("h", "e")]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(CONVERTER is None, reason="needs llama.cpp's convert_hf_to_gguf.py on PATH")
@pytest.mark.parametrize("name", ["open_llama_3b", "Llama-3.1-8B"])
@pytest.mark.parametrize("choice", [dict(n_embd=24, intermediate_size=100), UNEQUAL], ids=["uniform", "layerwise"])
def test_llama_cpp_computes_litgpts_logits(name, choice, tmp_path):
    gguf, llama_cpp = pytest.importorskip("gguf"), pytest.importorskip("llama_cpp")
    teacher = dataclasses.replace(WIDE[name], vocab_size=288, padded_vocab_size=288, block_size=64)
    tokenizer_dir = write_llama_tokenizer(tmp_path / "tokenizer")
    save_student(tmp_path / "lit", teacher, tokenizer_dir=tokenizer_dir, **choice)
    exported = gguf_export.export_gguf(tmp_path / "lit", tmp_path / "g", dtype="f32")
    student = load_model(tmp_path / "lit")
    n_params = sum(weight.numel() for weight in student.parameters())
    tensors = gguf.GGUFReader(tmp_path / "g/g.gguf").tensors
    n_stored = sum(int(tensor.n_elements) for tensor in tensors if tensor.name != "rope_freqs.weight")
    assert n_params == exported.n_params == n_stored
    opened = llama_cpp.Llama(
        str(tmp_path / "g/g.gguf"), logits_all=True, n_ctx=64, type_k=0, type_v=0, flash_attn=False, verbose=False
    )
    opened.eval(IDX[0].tolist())
    with torch.no_grad():
        expected = student(IDX[:1])[0]
    logits = torch.from_numpy(np.array(opened.scores[: len(expected)]))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
