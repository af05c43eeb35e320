"""Test students in Hugging Face's `transformers`: converted, cut, and converted back.

Each family makes the full round trip with the files of users: `save_pretrained`, litgpt's converter, `litgpt extract`,
litgpt's converter back, `from_pretrained` with the `config.json` of `extract`. The only addition is a tiny entry in
litgpt's table of models.
"""

import shutil
from dataclasses import dataclass, field
from typing import Any

import litgpt.config
import pytest
import torch
from litgpt.config import Config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
)

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.commands.extract import setup as extract
from litgpt_whittle.hf.export import export_hf
from litgpt_whittle.subnet import SubNet

GATED = dict(bias=False, norm_class_name="RMSNorm", parallel_residual=False, rotary_percentage=1.0)
LITGPT = dict(
    block_size=32, n_layer=4, n_embd=32, vocab_size=64, padded_vocab_size=64, n_head=4, head_size=16, n_query_groups=2,
    intermediate_size=24,
)  # fmt: skip
HF = dict(
    max_position_embeddings=32, num_hidden_layers=4, hidden_size=32, vocab_size=64, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, intermediate_size=24, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
CUT = dict(n_embd="0-7,12-23", n_layer="0,2-3", n_query_groups="1-1", heads_per_group=2, intermediate_size="3-18")


@dataclass
class Family:
    """A tiny family, as described by litgpt and by transformers."""

    name: str
    hf: Any
    litgpt: dict[str, Any]
    choices: list[dict[str, Any]] = field(default_factory=lambda: [CUT, CUT | {"head_size": 8}, CUT | {"head_size": 2}])


def _neox_hf() -> GPTNeoXConfig:
    sizes = {k: v for k, v in HF.items() if k not in ("head_dim", "num_key_value_heads")} | {"hidden_size": 64}
    return GPTNeoXConfig(**sizes, rotary_pct=0.25)


FAMILIES = [
    # GPT-NeoX in transformers has heads of hidden_size / num_attention_heads
    Family(
        "pythia-tiny",
        _neox_hf(),
        dict(n_embd=64, n_query_groups=4, rotary_percentage=0.25),
        [
            dict(n_embd="0-31,40-55", n_layer="0-1,3", n_query_groups="0,2-3", intermediate_size="3-18"),
            dict(n_embd=32, n_layer=2, n_query_groups=4, head_size=8, intermediate_size=16),
            dict(n_embd=8, n_query_groups=4, head_size=2),
        ],
    ),
    Family("Llama-tiny", LlamaConfig(**HF, rms_norm_eps=1e-5), GATED | dict(mlp_class_name="LLaMAMLP")),
    Family(
        "Llama-3-tiny",
        LlamaConfig(
            **HF,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            # transformers 4 does not know rope_parameters; 5 accepts both names
            rope_theta=500000.0,
            rope_scaling=dict(
                rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
        GATED
        | dict(
            mlp_class_name="LLaMAMLP",
            rope_base=500000,
            rope_adjustments=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16),
        ),
    ),
    Family(
        "Qwen3-tiny",
        Qwen3Config(**HF, rope_theta=1000000.0, rms_norm_eps=1e-6),
        GATED | dict(mlp_class_name="LLaMAMLP", norm_qk=True, rope_base=1000000, norm_eps=1e-6),
    ),
    Family(
        "Gemma-2-tiny",
        Gemma2Config(
            **HF, sliding_window=5, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
        ),
        GATED
        | dict(
            mlp_class_name="GemmaMLP", gelu_approximate="tanh", scale_embeddings=True, attention_scores_scalar=16,
            sliding_window_size=5, sliding_window_indices=[1, 0, 1, 0], post_attention_norm=True, post_mlp_norm=True,
            attention_logit_softcapping=5.0, final_logit_softcapping=3.0, norm_eps=1e-6,
        ),
    ),
    Family(
        "Gemma-3-tiny",
        Gemma3TextConfig(
            **HF | {"num_hidden_layers": 7}, sliding_window=5, query_pre_attn_scalar=16, rope_theta=1000000.0,
            rope_local_base_freq=10000.0,
        ),
        GATED
        | dict(
            n_layer=7, mlp_class_name="GemmaMLP", gelu_approximate="tanh", scale_embeddings=True, norm_qk=True,
            attention_scores_scalar=16, sliding_window_size=5, sliding_window_indices=[1, 1, 1, 1, 1, 0, 1],
            rope_base=1000000, rope_local_base_freq=10000, rope_indices=[1, 1, 1, 1, 1, 0, 1],
            post_attention_norm=True, post_mlp_norm=True, norm_eps=1e-6,
        ),
        [CUT | {"n_layer": layers, "head_size": size} for layers, size in (("0,5-6", 16), ("3-6", 8), (2, 4))],
    ),
    Family(
        "OLMo-2-tiny",
        Olmo2Config(**HF, rope_theta=500000.0, rms_norm_eps=1e-6),
        GATED
        | dict(
            mlp_class_name="LLaMAMLP", norm_1=False, norm_2=False, norm_qk=True, norm_qk_type="olmo2", rope_base=500000,
            post_attention_norm=True, post_mlp_norm=True, norm_eps=1e-6,
        ),
    ),
    Family(
        "Phi-3-tiny",
        Phi3Config(**HF, sliding_window=6),
        GATED | dict(mlp_class_name="LLaMAMLP", sliding_window_size=6),
    ),
    Family(
        "Mixtral-tiny",
        MixtralConfig(**HF, num_local_experts=4, num_experts_per_tok=2, rope_theta=1000000.0),
        GATED | dict(mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2, rope_base=1000000),
        [CUT | {"n_expert": "0,2-3"}, CUT | {"n_expert": 2, "head_size": 8}, {"n_expert": "1,3"}],
    ),
]  # fmt: skip
IDX = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def teacher(request, tmp_path_factory):
    """Save a random model of a family with transformers, and convert it with litgpt."""
    family, folder = request.param, tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family.hf, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Gemma's norms add one to their weight, so its 0 is equivalent to 1 elsewhere
            is_norm = "norm" in name
            weight.normal_(mean=1.0 if is_norm and "Gemma" not in family.name else 0.0, std=0.2)
        logits = model(IDX).logits
    model.save_pretrained(folder)
    entry = LITGPT | family.litgpt | {"name": family.name, "hf_config": {"org": "", "name": family.name}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(litgpt.config.name_to_config, family.name, entry)
        convert_hf_checkpoint(folder, model_name=family.name)
    return family, folder, logits


def test_litgpt_computes_what_transformers_computes(teacher):
    _family, folder, expected = teacher
    torch.testing.assert_close(load_model(folder)(IDX), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", range(3))
def test_student_is_the_same_in_transformers(teacher, choice, tmp_path):
    family, folder, _ = teacher
    subnet = SubNet(Config.from_checkpoint(folder), **family.choices[choice])
    subnet.save(tmp_path / "student.yaml")
    extract(folder, tmp_path / "student.yaml", tmp_path / "student")
    with load_model(folder, "SuperGPT").running(subnet) as model, torch.no_grad():
        expected = model(IDX)
    exported = export(tmp_path / "student", tmp_path / "hf", family)
    with torch.no_grad():
        torch.testing.assert_close(exported(IDX).logits, expected, rtol=1e-4, atol=5e-5)


def test_export_undoes_litgpts_conversion(teacher, tmp_path):
    _, folder, expected = teacher
    assert export_hf(folder, tmp_path / "hf", check=False).n_params
    with torch.no_grad():
        torch.testing.assert_close(reopen(tmp_path / "hf")(IDX).logits, expected, rtol=1e-4, atol=1e-4)


def export(student, folder, family):
    """Convert a student with litgpt and open it with transformers."""
    if family.name.startswith("OLMo-2"):
        # litgpt 0.5.13 cannot convert back: its table uses norm_2, a name that its model does not have
        with pytest.raises(KeyError, match="post_attention_norm"):
            convert_lit_checkpoint(student, folder)
        weights = torch.load(student / "lit_model.pth")
        weights = {name.replace("post_attention_norm", "norm_2"): weight for name, weight in weights.items()}
        torch.save(weights, student / "lit_model.pth")
    convert_lit_checkpoint(student, folder)
    shutil.copy(student / "config.json", folder)
    # transformers 5 looks for this name; litgpt's tutorial passes `state_dict`, which no longer works
    (folder / "model.pth").rename(folder / "pytorch_model.bin")
    return reopen(folder)


def reopen(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()
