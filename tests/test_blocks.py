"""Test hooks on running litgpt models: recorded activations equal the computed ones."""

import pytest
import torch
from architectures import ARCHITECTURES
from test_repair import model, windows

from litgpt_whittle.blocks import NonBlockModules, input_of, load_block, routing, run_block

EACH = pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
MIXTURES = {name: config for name, config in ARCHITECTURES.items() if config.mlp_class_name == "LLaMAMoE"}


@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES)
def test_experts_weighed_by_their_routing_make_up_the_output(config):
    moe = model(config).transformer.h[-1].mlp
    x = torch.randn(3, 7, config.n_embd)
    parts = routing(moe, x)
    assert ((parts > 0).sum(1) == config.n_expert_per_token).all()
    flat = x.flatten(0, 1)
    expected = sum(parts[:, j, None] * expert(flat) for j, expert in enumerate(moe.experts))
    if config.n_shared_expert:
        expected = expected + moe.shared_experts(flat)
    torch.testing.assert_close(moe(x).flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


@EACH
def test_block_after_block_computes_what_the_model_does(config):
    teacher, ids = model(config), windows(config, 3, 16)
    weights = teacher.state_dict()
    outer = {name: tensor for name, tensor in weights.items() if not name.startswith("transformer.h.")}
    outside = NonBlockModules(config, outer, 16, "cpu")
    stream = outside.embed(ids)
    for layer, args in enumerate(outside.block_args):
        prefix = f"transformer.h.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        block = load_block(config, layer, own)
        seen = run_block(block, stream, args, ["attn.proj", "mlp"])
        assert seen["mlp"].shape == stream.shape
        stopped = run_block(block, stream, args, ["attn.proj"], stop=True)
        assert torch.equal(stopped["attn.proj"], seen["attn.proj"]) and "out" not in stopped
        stream = seen["out"]
    logits = outside.head(outside.norm(stream))
    if config.final_logit_softcapping is not None:
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    torch.testing.assert_close(logits, teacher(ids), rtol=1e-5, atol=1e-5)


def test_the_input_of_a_part_is_what_it_reads():
    mlp = model(ARCHITECTURES["Llama-3.1-8B"]).transformer.h[0].mlp
    x = torch.randn(2, mlp.fc_1.in_features)
    torch.testing.assert_close(input_of(mlp.proj, mlp, x), torch.nn.functional.silu(mlp.fc_1(x)) * mlp.fc_2(x))
