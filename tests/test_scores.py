"""Test importance scores against their definitions: plain loops, finite differences, students without a unit."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES
from litgpt.config import Config
from litgpt.model import GPT, LLaMAMoE

from litgpt_whittle.index_plan import kept_indices, units_of
from litgpt_whittle.ranking.scores import METRICS, Scores, magnitudes, measure
from litgpt_whittle.student_block import part_of
from litgpt_whittle.subnet import SubNet, layer_sizes
from litgpt_whittle.supergpt import SuperGPT, extract_weights
from litgpt_whittle.unit_index import UnitIndex

EACH = pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)


def teacher(config: Config, tied: bool = False) -> SuperGPT:
    torch.manual_seed(0)
    model = SuperGPT(config).eval()
    for name, tensor in model.state_dict().items():
        torch.nn.init.normal_(tensor, mean=1.0 if "norm" in name or "ln_f" in name else 0.0, std=0.2)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model.double()


def windows(config: Config, n: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(config.vocab_size, (n, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def exact(monkeypatch):
    """Make litgpt's RMSNorm, which always computes in fp32, compute in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# -- activations of units


def see(model: GPT, sequence: torch.Tensor) -> dict:
    """Return the units' activations on one sequence, module by module: tensors of shape (T, …) by layer and kind."""
    config, seen, channels = model.config, {}, {}
    x = model.transformer.wte(sequence[None])
    x = x * torch.tensor(config.n_embd**0.5, dtype=x.dtype) if config.scale_embeddings else x
    cos, sin = model.cos[None, : len(sequence)], model.sin[None, : len(sequence)]

    def norm(layer: int, module, x):
        if isinstance(module, torch.nn.Identity):
            return x
        channels.setdefault(layer, []).append(module(x)[0])
        return module(x)

    for i, block in enumerate(model.transformer.h):
        which = (..., config.rope_indices[i]) if config.rope_indices is not None else (...,)
        project, block.attn.proj = block.attn.proj, torch.nn.Identity()
        normed = norm(i, block.norm_1, x)
        heads = block.attn(normed, cos[which], sin[which])
        block.attn.proj = project
        seen[i, "heads"] = heads[0].view(
            len(sequence), config.n_query_groups, config.n_head // config.n_query_groups, -1
        )
        attended = norm(i, block.post_attention_norm, project(heads))
        if config.parallel_residual:
            normed = normed if config.shared_attention_norm else norm(i, block.norm_2, x)
            x = x + attended
        else:
            x = x + attended
            normed = norm(i, block.norm_2, x)
        if isinstance(block.mlp, LLaMAMoE):
            out, seen[i, "neurons"], seen[i, "experts"] = _experts(block.mlp, normed[0])
            assert torch.allclose(out, block.mlp(normed)[0], atol=1e-6)  # litgpt routes in fp32
        else:
            hidden = _hidden(block.mlp, normed[0])
            seen[i, "neurons"] = hidden.abs()
        x = x + norm(i, block.post_mlp_norm, block.mlp(normed))
    norm(config.n_layer, model.transformer.ln_f, x)
    return seen | {"channels": channels}


def _hidden(mlp, x: torch.Tensor) -> torch.Tensor:
    gelu = {"approximate": mlp.config.gelu_approximate}
    if hasattr(mlp, "fc"):
        return F.gelu(mlp.fc(x), **gelu)
    gate = F.gelu(mlp.fc_1(x), **gelu) if type(mlp).__name__ == "GemmaMLP" else F.silu(mlp.fc_1(x))
    return gate * mlp.fc_2(x)


def _experts(moe: LLaMAMoE, x: torch.Tensor):
    """Return the output, the sizes of the neurons over all chosen experts, and the experts' shares, token by token."""
    config, width = moe.config, moe.experts[0].proj.in_features
    out, neurons, shares = torch.zeros_like(x), x.new_zeros(len(x), width), x.new_zeros(len(x), config.n_expert)
    for t in range(len(x)):
        if config.n_expert_groups:
            weights, chosen = (found[0] for found in moe.gate(x[t, None]))
        else:
            logits, chosen = moe.gate(x[t]).topk(config.n_expert_per_token)
            weights = logits.softmax(0)
        for weight, j in zip(weights * config.routed_scaling_factor, chosen.tolist()):
            answer = weight * moe.experts[j](x[t])
            out[t] += answer
            shares[t, j] = answer.norm()
            neurons[t] += _hidden(moe.experts[j], x[t]).abs()
        if config.n_shared_expert:
            out[t] += moe.shared_experts(x[t])
            # a unit of the shared experts consists of n_shared_expert neurons
            neurons[t] += _hidden(moe.shared_experts, x[t]).view(config.n_shared_expert, width).norm(dim=0)
    return out, neurons, shares


def root_of_squares(per_sequence: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(per_sequence).square().sum(0).sqrt()


@EACH
@torch.no_grad()
def test_activations_are_means_over_tokens_and_roots_of_squares_over_sequences(config, exact):
    model, ids = teacher(config), windows(config)
    got = measure(model, ids, 0, micro_batch_size=2, progress=False).units["activation"]
    seen = [see(model, sequence) for sequence in ids]
    for layer, own in enumerate(got.layers):
        heads = [one[layer, "heads"] for one in seen]
        expected = {
            "n_query_groups": [h.flatten(2).norm(dim=-1).mean(0) for h in heads],
            "heads_per_group": [h.transpose(1, 2).flatten(2).norm(dim=-1).mean(0) for h in heads],
        }
        width = next(kind for kind in own if kind.endswith("intermediate_size"))
        expected[width] = [one[layer, "neurons"].mean(0) for one in seen]
        if "n_expert" in own:
            expected["n_expert"] = [one[layer, "experts"].mean(0) for one in seen]
        assert set(expected) == set(own)
        for kind, per_sequence in expected.items():
            torch.testing.assert_close(own[kind], root_of_squares(per_sequence).double(), rtol=1e-5, atol=1e-6)
    for layer in range(config.n_layer + 1):
        norms = [one["channels"].get(layer, []) for one in seen]
        expected = sum(root_of_squares([of[i].abs().mean(0) for of in norms]) for i in range(len(norms[0])))
        torch.testing.assert_close(got.n_embd[layer], expected, rtol=1e-6, atol=1e-9)


# -- first-order changes of the loss


def losses(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """Return each sequence's mean loss."""
    logits = model(ids)[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def slope(model: GPT, ids: torch.Tensor, parts: list[torch.Tensor], eps: float = 2e-3) -> torch.Tensor:
    """Return the change of each sequence's loss when these views of weights are scaled, by a central difference."""
    before, found = [part.clone() for part in parts], []
    for scale in (1 + eps, 1 - eps):
        for part, value in zip(parts, before):
            part.copy_(value * scale)
        found.append(losses(model, ids))
    for part, value in zip(parts, before):
        part.copy_(value)
    return (found[0] - found[1]) / (2 * eps)


@EACH
@torch.no_grad()
def test_taylor_scores_are_how_the_loss_changes_when_a_unit_fades(config, exact):
    model, ids = teacher(config), windows(config)
    got = measure(model, ids, 0, micro_batch_size=2, progress=False).units["taylor"]
    layer = config.n_layer - 2
    block = model.transformer.h[layer]
    moe = isinstance(block.mlp, LLaMAMoE)
    projections = [e.proj for e in block.mlp.experts] if moe else [block.mlp.proj]
    shared = block.mlp.shared_experts.proj if moe and config.n_shared_expert else None
    size = block.attn.proj.in_features // config.n_head
    per_group = config.n_head // config.n_query_groups
    for kind, scores in got.layers[layer].items():
        for unit in {0, len(scores) - 1}:
            if kind == "n_query_groups":
                parts = [block.attn.proj.weight[:, unit * per_group * size : (unit + 1) * per_group * size]]
            elif kind == "heads_per_group":
                heads = range(unit, config.n_head, per_group)
                parts = [block.attn.proj.weight[:, head * size : (head + 1) * size] for head in heads]
            elif kind == "n_expert":
                parts = list(projections[unit].parameters())
            else:
                parts = [proj.weight[:, unit] for proj in projections]
                parts += [shared.weight[:, unit :: len(scores)]] if shared is not None else []
            expected = slope(model, ids, parts).abs().mean()
            torch.testing.assert_close(scores[unit], expected, rtol=2e-3, atol=1e-7)


@torch.no_grad()
def test_tokens_that_do_not_count_are_in_no_loss(exact, monkeypatch):
    config = ARCHITECTURES["Llama-3.1-8B"]
    model, ids = teacher(config), windows(config)
    counts = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    got = measure(model, ids, 3, micro_batch_size=2, progress=False, counts=counts)
    logits = model(ids[:3])[:, :-1]
    expected = F.cross_entropy(logits[counts[:3, :-1]], ids[:3, 1:][counts[:3, :-1]]).exp()
    assert got.perplexity == pytest.approx(float(expected), rel=1e-6)

    def masked(model: GPT, ids: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        return (losses * counts[:, :-1]).mean(1)

    monkeypatch.setitem(globals(), "losses", masked)
    parts = [model.transformer.h[1].mlp.proj.weight[:, 5]]
    expected = slope(model, ids, parts).abs().mean()
    torch.testing.assert_close(got.units["taylor"].layers[1]["intermediate_size"][5], expected, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["phi-2", "Llama-3.1-8B", "Gemma-2-2b", "OLMo-2-1124-7B"])
@torch.no_grad()
def test_taylor_scores_of_channels_add_up_over_the_norms(name, exact):
    config = ARCHITECTURES[name]
    model, ids, layer = teacher(config), windows(config), 1
    got = measure(model, ids, 0, micro_batch_size=2, progress=False).units["taylor"].n_embd
    for norms, row in ((model.transformer.h[layer].children(), layer), ([model.transformer.ln_f], config.n_layer)):
        norms = [m for m in norms if "Norm" in type(m).__name__]
        for channel in (0, 5):
            expected = 0.0
            for norm in norms:
                if getattr(norm, "add_unit_offset", False):  # Gemma's norms multiply by 1 + weight
                    parts, norm.add_unit_offset = [norm.weight[channel : channel + 1]], False
                    norm.weight += 1
                    expected += slope(model, ids, parts).abs().mean()
                    norm.weight -= 1
                    norm.add_unit_offset = True
                else:
                    parts = [tensor[channel : channel + 1] for tensor in norm.parameters()]
                    expected += slope(model, ids, parts).abs().mean()
            torch.testing.assert_close(got[row, channel], expected, rtol=2e-3, atol=1e-7)


# -- weights


def squares(weights: dict) -> float:
    """Return the squares of all matrices, tied ones once."""
    distinct = {tensor.data_ptr(): tensor for tensor in weights.values() if tensor.dim() == 2}
    return sum(float(tensor.square().sum()) for tensor in distinct.values())


def without(teacher: Config, kind: str, layer: int, unit: int, size: int) -> SubNet:
    keep = UnitIndex([other for other in range(size) if other != unit])
    if kind == "n_embd":
        return SubNet(teacher, n_embd=keep)
    sizes = [layer_sizes(teacher, i).get(kind) for i in range(teacher.n_layer)]
    return SubNet(teacher, **{kind: [keep if i == layer else n for i, n in enumerate(sizes)]})


@EACH
@pytest.mark.parametrize("tied", [False, True])
def test_magnitudes_are_what_a_student_without_the_unit_lacks(config, tied):
    model, layer = teacher(config, tied), config.n_layer - 1
    got, total = magnitudes(model), squares(model.state_dict())
    # the heads of a group share keys and values, whose weights count for none of them
    for kind, scores in [*got.layers[layer].items(), ("n_embd", got.n_embd)]:
        size = scores.shape[-1]
        if size == 1 or kind == "n_expert":
            continue
        for unit in {0, size // 2, size - 1}:
            left = squares(extract_weights(model, without(config, kind, layer, unit, size), tied))
            found = scores.square()[..., unit].sum() if kind == "n_embd" else scores[unit] ** 2
            assert float(found) == pytest.approx(total - left, rel=1e-9)
    if "n_expert" in got.layers[layer]:
        moe = model.transformer.h[layer].mlp
        for j, expert in enumerate(moe.experts):
            expected = squares(expert.state_dict()) + float(moe.gate.weight.data[j].square().sum())
            assert float(got.layers[layer]["n_expert"][j]) ** 2 == pytest.approx(expected, rel=1e-9)


def test_every_index_of_an_axis_belongs_to_one_unit_or_to_all():
    config = ARCHITECTURES["Llama-3.1-8B"]
    units = units_of(config, 0)
    assert set(units) == set(layer_sizes(config, 0))
    everything = kept_indices(config, 0, torch.arange(config.head_size).numpy(), SubNet.full(config).layer(0))
    assert sorted(units["n_query_groups"]["qkv"].ravel()) == everything["qkv"].tolist()
    # keys and values come after the queries
    assert sorted(units["heads_per_group"]["qkv"].ravel()) == list(range(config.n_head * config.head_size))
    assert units["heads_per_group"]["attention"].shape == (2, 2 * config.head_size)


# -- layers


@pytest.mark.parametrize("name", ["phi-2", "Mixtral-8x7B-v0.1"])
@torch.no_grad()
def test_layers_by_how_they_turn_the_stream_and_by_what_is_lost_without_them(name, exact):
    config = ARCHITECTURES[name]
    model, ids = teacher(config), windows(config, 4)
    got = measure(model, ids, 3, micro_batch_size=2, progress=False)
    streams = []
    handles = [b.register_forward_hook(lambda _, x, y: streams.append((x[0], y))) for b in model.transformer.h]
    model(ids)
    for handle in handles:
        handle.remove()
    for layer, (x, y) in enumerate(streams):
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1))]
        expected = 1 - sum(cosines) / len(cosines)
        assert float(got.layers["block_influence"][layer]) == pytest.approx(expected, rel=1e-9)
        others = [i for i in range(config.n_layer) if i != layer]
        student = GPT(dataclasses.replace(config, n_layer=config.n_layer - 1)).double().eval()
        student.load_state_dict(extract_weights(model, SubNet(config, n_layer=UnitIndex(others))))
        expected = math.exp(float(losses(student, ids[:3]).mean()))
        assert float(got.layers["perplexity"][layer]) == pytest.approx(expected, rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(float(losses(model, ids[:3]).mean())), rel=1e-6)


@pytest.mark.parametrize("name", ["phi-2", "Qwen3-0.6B", "Gemma-2-2b", "OLMo-2-1124-7B"])
@torch.no_grad()
def test_sub_layers_by_how_they_turn_the_stream(name, exact):
    """With parallel residuals, norms after sub-layers, or neither; the oracle runs blocks that lack the MLP."""
    config = ARCHITECTURES[name]
    model, ids, calls = teacher(config), windows(config, 2), []
    got = measure(model, ids, 0, progress=False)
    for block in model.transformer.h:
        block.register_forward_hook(lambda block, args, y: calls.append((block, args, y)))
    model(ids)
    for layer, (block, args, after) in enumerate(list(calls)):
        with_attention = part_of(block, "attn")(*args)
        assert float(got.sublayers["attn"][layer]) == pytest.approx(angle(args[0], with_attention), rel=1e-9)
        assert float(got.sublayers["mlp"][layer]) == pytest.approx(angle(with_attention, after), rel=1e-9)


def angle(x, y):
    """Return one minus the cosine similarity of two residual streams, averaged over tokens."""
    return 1 - float((x * y).sum(-1).div(x.norm(dim=-1) * y.norm(dim=-1)).mean())


def same(one: Scores, two: Scores, **tolerance) -> None:
    for metric in METRICS:
        for ours, theirs in zip(one.units[metric].layers, two.units[metric].layers):
            torch.testing.assert_close(ours, theirs, **tolerance)
        torch.testing.assert_close(one.units[metric].n_embd, two.units[metric].n_embd, **tolerance)
    torch.testing.assert_close(one.layers, two.layers, **tolerance)
    torch.testing.assert_close(one.sublayers, two.sublayers, **tolerance)


def test_scores_are_the_same_every_time_and_whatever_the_batches():
    config = ARCHITECTURES["Qwen3-0.6B"]
    ids = windows(config, 5)
    one = measure(teacher(config), ids, 2, micro_batch_size=5, progress=False)
    same(one, measure(teacher(config), ids, 2, micro_batch_size=5, progress=False), rtol=0, atol=0)
    same(one, measure(teacher(config), ids, 2, micro_batch_size=2, progress=False), rtol=1e-6, atol=1e-9)


def test_measuring_leaves_the_model_as_it_was():
    config = ARCHITECTURES["latent"]
    model, ids = teacher(config), windows(config)
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(ids).detach()
    measure(model, ids, 2, progress=False)
    model.lm_head.tapping = False
    assert torch.equal(model(ids), logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_the_only_layer_cannot_be_left_out():
    config = dataclasses.replace(ARCHITECTURES["phi-2"], n_layer=1)
    got = measure(teacher(config), windows(config), 1, progress=False)
    assert got.layers["perplexity"].tolist() == [math.inf] and math.isfinite(got.perplexity)


def test_an_unknown_module_is_refused():
    config = ARCHITECTURES["phi-2"]
    model = teacher(config)
    model.transformer.h[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="No slicing rule for 'extra'"):
        measure(model, windows(config), 0, progress=False)
