"""Test `litgpt export --format deci`: an independent reader of the format computes litgpt's logits; rejected input."""

import dataclasses
import json
import math

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st
from litgpt.utils import CLI
from safetensors.torch import load_file
from test_export import IDX, random_weights
from texts import write_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from litgpt_whittle.checkpoint import load_model, save_checkpoint
from litgpt_whittle.commands.export import setup
from litgpt_whittle.errors import UserError
from litgpt_whittle.hf.decilm.configuration_decilm import DeciLMConfig, neurons
from litgpt_whittle.hf.decilm.modeling_decilm import DeciLMForCausalLM
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import extract_weights

WIDE = {name: dataclasses.replace(ARCHITECTURES[name], intermediate_size=768, n_head=8, n_query_groups=4)
        for name in ("open_llama_3b", "Llama-3.1-8B")}  # fmt: skip
LAYERWISE = dict(
    n_embd="0-7,12-23", n_layer="0-1,3", intermediate_size=[512, "0-127,300-427", 768], n_query_groups=[2, 4, 2],
    heads_per_group=[2, 1, 2],
)  # fmt: skip
TEACHER = WIDE["open_llama_3b"]


def save_student(folder, teacher, tied=False, tokenizer_dir=None, **choice):
    subnet = SubNet(teacher, **choice)
    weights = extract_weights(random_weights(teacher, tied), subnet)
    save_checkpoint(folder, subnet, weights, tokenizer_dir)
    return folder


def width_in_vllm(ffn_mult, hidden_size):
    """Return the neurons of a layer as vLLM and llama.cpp compute them."""
    n = int(2 * ffn_mult * hidden_size / 3)
    return n if n % 256 == 0 else n + 256 - n % 256


class Reader(nn.Module):
    """A Llama with sizes for each layer, built from the format's `config.json` alone."""

    def __init__(self, folder):
        super().__init__()
        content = json.loads((folder / "config.json").read_text())
        self.blocks = content.pop("block_configs")
        self.config = LlamaConfig(**content, attn_implementation="eager")
        assert len(self.blocks) == self.config.num_hidden_layers
        heads, n_embd = self.config.num_attention_heads, self.config.hidden_size
        self.embed_tokens = nn.Embedding(self.config.vocab_size, n_embd)
        self.layers = nn.ModuleList()
        for i, block in enumerate(self.blocks):
            sizes = dict(
                num_key_value_heads=heads // block["attention"]["n_heads_in_group"],
                intermediate_size=width_in_vllm(block["ffn"]["ffn_mult"], n_embd),
            )
            config = LlamaConfig(**{**content, **sizes}, attn_implementation="eager")
            self.layers.append(LlamaDecoderLayer(config, i))
        self.norm = LlamaRMSNorm(n_embd, self.config.rms_norm_eps)
        self.lm_head = nn.Linear(n_embd, self.config.vocab_size, bias=False)
        weights = load_file(folder / "model.safetensors")
        if self.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})

    @torch.no_grad()
    def forward(self, idx):
        x, positions = self.embed_tokens(idx), torch.arange(idx.shape[1])[None]
        mask = torch.full((1, 1, idx.shape[1], idx.shape[1]), -math.inf).triu(1)
        angles = LlamaRotaryEmbedding(self.config)(x, positions)
        for layer in self.layers:
            out = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=angles)
            x = out if isinstance(out, torch.Tensor) else out[0]
        return self.lm_head(self.norm(x))


@pytest.mark.parametrize(("name", "tied"), [("open_llama_3b", False), ("Llama-3.1-8B", True)])
@pytest.mark.parametrize("choice", [LAYERWISE, dict(n_layer=3, n_embd=24)], ids=["layerwise", "uniform"])
def test_an_independent_reader_of_the_format_computes_litgpts_logits(name, tied, choice, tmp_path):
    save_student(tmp_path / "lit", WIDE[name], tied, **choice)
    CLI(setup, args=[str(tmp_path / "lit"), "--format", "deci", "--out_dir", str(tmp_path / "deci")])
    reader, student = Reader(tmp_path / "deci"), load_model(tmp_path / "lit")
    with torch.no_grad():
        torch.testing.assert_close(reader(IDX), student(IDX), rtol=2e-5, atol=2e-5)
    stored = sum(weight.numel() for weight in load_file(tmp_path / "deci/model.safetensors").values())
    assert stored == sum(weight.numel() for weight in set(student.parameters()))


def test_transformers_loads_and_generates_by_the_code_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    write_tokenizer(tmp_path / "tokenizer")
    save_student(tmp_path / "lit", TEACHER, tokenizer_dir=tmp_path / "tokenizer", **LAYERWISE)
    setup(tmp_path / "lit", format="deci", out_dir=tmp_path / "deci", check=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    block = model.config.block_configs[0]  # as vLLM reads it
    assert block.attention.n_heads_in_group == 2 and not block.attention.no_op and not hasattr(block.ffn, "hidden_act")
    new = model.generate(IDX[:1, :8], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    student, expected = load_model(tmp_path / "lit"), IDX[:1, :8]
    with torch.no_grad():
        for _ in range(5):
            logits = student(expected)[:, -1:]
            logits[..., model.config.eos_token_id] = -math.inf  # min_new_tokens
            expected = torch.cat([expected, logits.argmax(-1)], dim=1)
    assert torch.equal(new, expected)
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert again["block_configs"] == json.loads((tmp_path / "deci/config.json").read_text())["block_configs"]
    assert AutoTokenizer.from_pretrained(tmp_path / "deci", trust_remote_code=True)("the fox")["input_ids"]


@given(st.integers(1, 2**18), st.integers(1, 2**17))
def test_every_multiple_of_256_neurons_is_exact_even_if_the_multiplier_is_rounded(n, n_embd):
    multiplier = 3 * 256 * n / (2 * n_embd)
    for ffn_mult in (multiplier, round(multiplier, 6)):  # mlx-lm rounds
        assert neurons(ffn_mult, n_embd) == width_in_vllm(ffn_mult, n_embd) == 256 * n


@torch.no_grad()
def test_a_sublayer_that_is_left_out_adds_nothing():
    plain = {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"ffn_mult": 12.0, "no_op": False}}
    blocks = [plain, plain | {"attention": {"n_heads_in_group": None, "no_op": True}}, plain,
              plain | {"ffn": {"ffn_mult": None, "no_op": True}}]  # fmt: skip
    sizes = dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4, vocab_size=64,
        intermediate_size=256, max_position_embeddings=24,
    )  # fmt: skip
    torch.manual_seed(0)
    full = DeciLMForCausalLM(DeciLMConfig([plain] * 4, **sizes)).eval()
    cut = DeciLMForCausalLM(DeciLMConfig(blocks, **sizes)).eval()
    cut.load_state_dict(full.state_dict(), strict=False)
    assert not any(name.startswith(("model.layers.1.self", "model.layers.3.mlp")) for name in cut.state_dict())
    full.model.layers[1].self_attn.o_proj.weight.zero_()
    full.model.layers[3].mlp.down_proj.weight.zero_()
    torch.testing.assert_close(cut(IDX).logits, full(IDX).logits)


@pytest.mark.parametrize(
    ("teacher", "choice", "message"),
    [
        (TEACHER, dict(n_query_groups=[4, 2, 4, 4]), "got 8 in layer 0 and 4 in layer 1.*fixed"),
        (TEACHER, dict(intermediate_size=[512, 512, 300, 768]), "got 300 in layer 2.*step.intermediate_size 256"),
        (ARCHITECTURES["Qwen3-0.6B"], {}, "which is a Qwen 3; use --format hf"),
    ],
)
def test_students_that_the_format_cannot_express_are_rejected(teacher, choice, message, tmp_path):
    save_student(tmp_path / "lit", teacher, **choice)
    with pytest.raises(UserError, match=message) as error:
        setup(tmp_path / "lit", format="deci", out_dir=tmp_path / "deci")
    assert "\n" not in str(error.value) and not (tmp_path / "deci").exists()
