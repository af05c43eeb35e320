"""Test `litgpt export`: transformers opens its output with litgpt's logits; rejected input."""

import dataclasses
import json

import litgpt.config
import pytest
import torch
from architectures import ARCHITECTURES
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.utils import CLI
from texts import write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from litgpt_whittle.checkpoint import load_model, save_checkpoint
from litgpt_whittle.commands.export import setup
from litgpt_whittle.errors import UserError
from litgpt_whittle.families import (
    FAMILIES,
    check_expressible,
    family_name,
)
from litgpt_whittle.hf import export
from litgpt_whittle.rope import legal_head_sizes
from litgpt_whittle.subnet import SubNet, layer_sizes
from litgpt_whittle.supergpt import extract_weights

KNOWN = {name: config for name, config in ARCHITECTURES.items() if name not in ("latent", "interleaved", "yarn")}
IDX = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(1))
SLOW = pytest.mark.slow
LLAMA, NEOX = KNOWN["open_llama_3b"], dataclasses.replace(KNOWN["stablelm-base-alpha-3b"], n_embd=64)


def random_weights(config, tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    model = GPT(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    return weights | ({"lm_head.weight": weights["transformer.wte.weight"]} if tied else {})


def save(folder, config, **options):
    save_checkpoint(folder, config, random_weights(config, **options))
    return folder


def opened(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def assert_same(folder, expected):
    torch.testing.assert_close(opened(folder)(IDX).logits, expected, rtol=2e-5, atol=2e-5)


def students(config):
    """Make a teacher of the architecture and two of its sub-networks, with equal and with unequal layers."""
    is_free = FAMILIES[family_name(config)].free_heads
    # heads share the channels if the teacher's do, and the students' heads are padded
    teacher = config if is_free else dataclasses.replace(config, n_embd=64)
    sizes = layer_sizes(teacher, 0)
    experts = {"n_expert": "0,2-3"} if "n_expert" in sizes else {}
    groups, per_group = sizes["n_query_groups"], sizes["heads_per_group"]
    channels = "0-7,12-23" if is_free else "0-31,40-55"
    head_size = next(size for size in legal_head_sizes(teacher) if size >= 8)
    uniform = dict(
        n_embd=channels, n_layer="0,2-3", n_query_groups=max(1, groups // 2), heads_per_group=max(1, per_group // 2),
        head_size=head_size, **experts,
    )  # fmt: skip
    n_query_groups = [min(groups, n) for n in (1, 2, 2)]
    heads_per_group = [min(per_group, n) for n in (2, 1, 2)]
    layerwise = dict(
        n_embd=channels if is_free else 64, n_layer="0-1,3", n_query_groups=n_query_groups,
        heads_per_group=heads_per_group, **experts,
    )  # fmt: skip
    width = "moe_intermediate_size" if "moe_intermediate_size" in sizes else "intermediate_size"
    return teacher, [SubNet(teacher, **uniform), SubNet(teacher, **layerwise, **{width: [9, 16, "3-15"]})]


CASES = [(name, "uniform") for name in KNOWN]
CASES += [
    # padding is the same for all families except those that norm or route
    pytest.param(name, "layerwise", marks=() if name in ("falcon-40b", "OLMo-2-1124-7B", "Qwen3-30B-A3B") else SLOW)
    for name in KNOWN
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_transformers_computes_what_litgpt_does(name, kind, tmp_path):
    teacher, subnets = students(KNOWN[name])
    subnet = subnets[kind == "layerwise"]
    save_checkpoint(tmp_path / "student", subnet, extract_weights(random_weights(teacher), subnet))
    export.export_hf(tmp_path / "student", tmp_path / "hf", check=False)
    with torch.no_grad():
        assert_same(tmp_path / "hf", load_model(tmp_path / "student")(IDX))


EXPERTS = [("Mixtral-8x7B-v0.1", 20), ("Mixtral-8x7B-v0.1", None), ("Qwen3-30B-A3B", None), ("Qwen3-30B-A3B", 20)]


@pytest.mark.parametrize(("name", "width"), EXPERTS)
@pytest.mark.parametrize("kept", [10, [9, 10, "3-12", 8]], ids=["uniform", "layerwise"])
def test_experts_keep_their_width_under_any_name_and_setting(name, width, kept, tmp_path, capsys):
    """litgpt reads it from `moe_intermediate_size` or else `intermediate_size`, Mixtral only from the latter."""
    teacher = dataclasses.replace(KNOWN[name], moe_intermediate_size=width)
    subnet = SubNet(teacher, **{"intermediate_size" if width is None else "moe_intermediate_size": kept})
    save_checkpoint(tmp_path / "student", subnet, extract_weights(random_weights(teacher), subnet))
    setup(tmp_path / "student", out_dir=tmp_path / "hf")
    assert "experts_implementation='eager'" in capsys.readouterr().out
    model = opened(tmp_path / "hf")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    stock = GPT(Config.from_checkpoint(tmp_path / "student"))
    stock.load_state_dict(torch.load(tmp_path / "student/lit_model.pth", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(model(IDX).logits, stock(IDX), rtol=2e-5, atol=2e-5)


def test_a_mixtral_students_copied_config_has_the_width_of_its_experts(tmp_path):
    """litgpt's converted weights must open with the config.json that extract writes."""
    teacher = dataclasses.replace(KNOWN["Mixtral-8x7B-v0.1"], moe_intermediate_size=20)
    (tmp_path / "teacher").mkdir()
    MixtralConfig(hidden_size=32, intermediate_size=20).save_pretrained(tmp_path / "teacher")
    subnet = SubNet(teacher, moe_intermediate_size=12)
    save_checkpoint(
        tmp_path / "student", subnet, extract_weights(random_weights(teacher), subnet), tmp_path / "teacher"
    )
    assert MixtralConfig.from_pretrained(tmp_path / "student").intermediate_size == 12
    assert Config.from_checkpoint(tmp_path / "student").moe_intermediate_size == 12


def test_every_family_is_among_the_architectures():
    assert {family_name(config) for config in KNOWN.values()} == set(FAMILIES)


@pytest.mark.parametrize("config", [LLAMA, NEOX, KNOWN["Gemma-2b"], KNOWN["falcon-7b"]], ids=lambda config: config.name)
def test_a_tied_head_stays_tied(config, tmp_path):
    config = students(config)[0]
    save(tmp_path / "lit", config, tied=True)
    exported = export.export_hf(tmp_path / "lit", tmp_path / "hf")
    model = opened(tmp_path / "hf")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert exported.n_params == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("config", [LLAMA, NEOX], ids=lambda config: config.name)
def test_litgpt_converts_it_back_to_the_same_weights(config, tmp_path, monkeypatch):
    name = config.name
    weights = random_weights(config, dtype=torch.bfloat16)
    save_checkpoint(tmp_path / "lit", config, weights)
    export.export_hf(tmp_path / "lit", tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    monkeypatch.setitem(litgpt.config.name_to_config, name, dataclasses.asdict(config))
    convert_hf_checkpoint(tmp_path / "hf", model_name=name)
    back = torch.load(tmp_path / "hf/lit_model.pth")
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in back)


def test_tokenizer_special_tokens_and_provenance_come_along(tmp_path, capsys):
    write_tokenizer(tmp_path / "tokenizer")
    weights, origin = random_weights(LLAMA), {"teacher": "big", "n_params": 5, "n_params_teacher": 9}
    save_checkpoint(tmp_path / "lit", LLAMA, weights, tmp_path / "tokenizer", {"provenance": origin})
    CLI(setup, args=[str(tmp_path / "lit"), "--format", "hf", "--out_dir", str(tmp_path / "hf")])
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM" in printed and "of the largest logit" in printed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.decode(tokenizer("the quick brown fox")["input_ids"]) == "the quick brown fox"
    assert opened(tmp_path / "hf").config.eos_token_id == tokenizer.eos_token_id
    assert "A sub-network of big" in (tmp_path / "hf/README.md").read_text()


def test_the_teachers_config_is_kept_where_it_says_more(tmp_path):
    save(tmp_path / "lit", LLAMA)
    original = {
        "model_type": "llama", "initializer_range": 0.123, "eos_token_id": 7, "vocab_size": 99999, "hidden_size": 4096,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}, "auto_map": {"AutoConfig": "code.Config"},
        "rms_norm_eps": 0.5, "head_dim": 128, "dtype": "float16",
    }  # fmt: skip
    (tmp_path / "lit/config.json").write_text(json.dumps(original))
    export.export_hf(tmp_path / "lit", tmp_path / "hf")
    config = opened(tmp_path / "hf").config
    assert (config.initializer_range, config.eos_token_id, config.vocab_size) == (0.123, 7, LLAMA.padded_vocab_size)
    assert {"auto_map", "dtype"}.isdisjoint(json.loads((tmp_path / "hf/config.json").read_text()))


@pytest.mark.parametrize(("n_embd", "n_head", "filled"), [(64, 1, 3), (48, 2, 1), (48, 4, None), (40, 2, None)])
def test_zero_heads_fill_up_the_channels_where_they_can(n_embd, n_head, filled, tmp_path):
    config = dataclasses.replace(NEOX, n_embd=n_embd, n_head=n_head, n_query_groups=n_head)
    if filled is None:
        with pytest.raises(UserError, match="n_embd / n_head dimensions.*search_space.fixed"):
            setup(save(tmp_path / "lit", config), out_dir=tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
    else:
        exported = export.export_hf(save(tmp_path / "lit", config), tmp_path / "hf")
        assert f"padded with {filled} zero heads" in exported.notes[0] and exported.difference < 1e-5


# -- rejected input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ARCHITECTURES["latent"], "needs rope_interleave = False"),
        (ARCHITECTURES["interleaved"], "needs rope_interleave = False"),
        (ARCHITECTURES["yarn"], "without YaRN"),
        (dataclasses.replace(LLAMA, rotary_percentage=0.5), "rotary_percentage = 1.0, got 0.5"),
        (dataclasses.replace(LLAMA, lm_head_bias=True), "lm_head_bias = False, got True"),
        (dataclasses.replace(NEOX, n_query_groups=2), "n_query_groups = n_head, got 2 and 4"),
        (dataclasses.replace(KNOWN["OLMo-1B-hf"], norm_eps=1e-6), "norm_eps = 1e-5"),
        (dataclasses.replace(KNOWN["phi-2"], parallel_residual=False, shared_attention_norm=False), "residual = True"),
        (dataclasses.replace(KNOWN["Mathstral-7B-v0.1"], sliding_window_indices=[1, 0, 1, 1]), "in all layers or none"),
        (dataclasses.replace(LLAMA, rope_adjustments={"factor": 2.0}, rope_condense_ratio=2), "got both"),
    ],
)
def test_what_transformers_cannot_express_is_told_before_any_weight_is_read(config, message):
    with pytest.raises(UserError, match=message) as error:
        check_expressible(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(LLAMA, norm_qk=True), "does not support LlamaForCausalLM with .*norm_q"),
        (dataclasses.replace(LLAMA, scale_embeddings=True), "logits differ"),
        (dataclasses.replace(NEOX, bias=False), "missing keys"),
    ],
)
def test_what_comes_out_different_is_not_exported(config, message, tmp_path):
    save(tmp_path / "lit", config)
    with pytest.raises(UserError, match=message) as error:
        setup(tmp_path / "lit", out_dir=tmp_path / "hf")
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["lit"]


def test_only_an_exported_model_is_overwritten(tmp_path):
    save(tmp_path / "lit", LLAMA)
    setup(tmp_path / "lit", out_dir=tmp_path / "hf", check=False)
    with pytest.raises(UserError, match="--overwrite true"):
        setup(tmp_path / "lit", out_dir=tmp_path / "hf")
    setup(tmp_path / "lit", out_dir=tmp_path / "hf", overwrite=True, check=False)
    save(tmp_path / "other", LLAMA)
    with pytest.raises(UserError, match="--overwrite only replaces checkpoints"):
        setup(tmp_path / "lit", out_dir=tmp_path / "other", overwrite=True)


def test_damaged_inputs_are_told(tmp_path):
    save(tmp_path / "lit", LLAMA)
    (tmp_path / "lit/config.json").write_text("{")
    with pytest.raises(UserError, match="is not a Hugging Face config"):
        setup(tmp_path / "lit", out_dir=tmp_path / "hf")
    with pytest.raises(UserError, match="an amount in bytes looks like"):
        setup(tmp_path / "lit", out_dir=tmp_path / "hf", max_shard_size="5 apples")
    with pytest.raises(UserError, match="there is no checkpoint"):
        setup(tmp_path / "nowhere", out_dir=tmp_path / "hf")
