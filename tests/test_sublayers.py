"""Test sub-networks without the attention or the MLP of some layers: forward, counts, extraction, repair, export."""

import pytest
import torch
from architectures import ARCHITECTURES, KINDS, drops, sweep
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.model import GPT
from litgpt.utils import num_parameters
from test_quick_repair import cut_of, super_gpt
from test_repair import distance, model, repair, student_of, watched, windows
from test_train import checkpoint, config, run, train_args

from litgpt_whittle import supergpt as super_network
from litgpt_whittle.batches import Batch
from litgpt_whittle.checkpoint import load_model, save_checkpoint
from litgpt_whittle.distillation.args import DistillArgs, HiddenArgs
from litgpt_whittle.distillation.hidden import HiddenLoss
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness.perplexity import RepairedPerplexity
from litgpt_whittle.fitness.proxies import BlockInfluence
from litgpt_whittle.hf.export import export_hf
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.latency import latency
from litgpt_whittle.metrics import flops, kv_cache_bytes
from litgpt_whittle.repair.from_moments import MomentRepair
from litgpt_whittle.repair.sequential import SequentialRepair
from litgpt_whittle.subnet import DROPS, SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, SuperGPT, extract_weights, pad, student_model
from litgpt_whittle.testing.inputs import random_ranking

LLAMA = ARCHITECTURES["Llama-3.1-8B"]
FAMILIES = [*KINDS, "stablelm-base-alpha-3b", "OLMo-2-1124-7B", "Gemma-2-2b"]
BOTH = {"drop_attention": "2-2", "drop_mlp": "1-1"}


def zeroing(net: GPT, subnet: SubNet) -> GPT:
    """Make a full model's dropped sub-layers add zero: the oracle of a cut that drops nothing else."""
    for name, part, norm in zip(DROPS, ("attn", "mlp"), ("post_attention_norm", "post_mlp_norm")):
        dropped = getattr(subnet, name)
        for layer in () if dropped is None else dropped.indices:
            block = net.transformer.h[layer]
            for module in (getattr(block, part), getattr(block, norm)):
                module.register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    return net


@sweep(ARCHITECTURES, fast=FAMILIES)
@torch.no_grad()
def test_a_dropped_sub_layer_adds_nothing_in_every_form_of_the_student(config, tmp_path):
    net = SuperGPT(config).eval()
    net.load_state_dict(model(config, std=0.1).state_dict())
    idx = windows(config, 2)
    subnet = SubNet(config, **BOTH)
    with net.running(subnet):
        expected = net(idx)
    save_checkpoint(tmp_path / "student", subnet, extract_weights(net, subnet))
    student = load_model(tmp_path / "student")
    assert type(student) is LayerwiseGPT and num_parameters(student) == n_params(config, subnet)
    assert torch.equal(student(idx), expected)
    stock = GPT(subnet.config).eval()
    stock.load_state_dict(torch.load(tmp_path / "student" / "lit_model.pth", weights_only=True))
    torch.testing.assert_close(stock(idx), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(zeroing(net, subnet)(idx), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@settings(max_examples=10)
@given(data=st.data())
def test_counts_are_those_of_the_students_parameters(config, data):
    layers = sorted(data.draw(st.sets(st.integers(0, config.n_layer - 1), min_size=2)))
    subnet = SubNet(config, n_layer=",".join(map(str, layers)), n_embd=24, **data.draw(drops(layers)))
    with torch.device("meta"):
        student = student_model(subnet)
    assert n_params(config, subnet) == num_parameters(student)
    assert student.state_dict().keys() == extract_weights(SuperGPT(config), subnet).keys()
    again = SubNet.from_dict(config, subnet.to_dict())
    assert again == subnet and hash(again) == hash(subnet) and repr(again) == repr(subnet)


def test_a_dropped_attention_has_no_kv_cache_and_no_scores():
    full, less = SubNet.full(LLAMA), SubNet(LLAMA, drop_attention="1-2")
    bytes_of = [kv_cache_bytes(LLAMA, subnet, 1, 8, torch.float32) for subnet in (full, less)]
    assert bytes_of[1] == bytes_of[0] // 2
    scores = 2 * 2 * LLAMA.n_head * 2 * LLAMA.head_size  # of two layers, per token of the sequence
    assert flops(LLAMA, full, 9) - flops(LLAMA, full, 8) == 2 * scores
    assert flops(LLAMA, less, 9) - flops(LLAMA, less, 8) == scores
    assert all(seconds > 0 for seconds in latency(less, prompt_length=12, new_tokens=2, repeats=1))


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ({"n_layer": "0,2", "drop_mlp": "1-1"}, "drop_mlp lists layer 1, which n_layer does not keep; remove it"),
        ({"drop_attention": "4-4"}, "drop_attention must lie within the teacher's 4, got index 4"),
        ({"drop_attention": "0,2", "drop_mlp": "2-2"}, "layer 2 has neither attention nor MLP; drop the layer instead"),
        ({"drop_attention": 4}, "drop_attention lists all 4 kept layers; leave at least one out"),
        ({"drop_mlp": "x"}, "drop_mlp: ranges look like"),
    ],
)
def test_illegal_drops_are_named(choice, problem):
    with pytest.raises(UserError, match=problem) as error:
        SubNet(LLAMA, **choice)
    assert "\n" not in str(error.value)


def test_entries_of_dropped_sub_layers_do_not_matter():
    sizes = SubNet(LLAMA, drop_mlp="1-1", intermediate_size=[8, None, 8, 8])
    assert sizes == SubNet(LLAMA, drop_mlp="1-1", intermediate_size=8)
    assert sizes == SubNet(LLAMA, intermediate_size=[8, 9, 8, 8]).replace(drop_mlp="1-1")
    assert sizes != SubNet(LLAMA, intermediate_size=8)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Gemma-2-2b", "Qwen3-30B-A3B"])
def test_training_the_padded_form_leaves_dropped_sub_layers_zero(name):
    config = ARCHITECTURES[name]
    subnet = SubNet(config, **BOTH)
    stock = GPT(subnet.config)
    stock.load_state_dict(pad(subnet, extract_weights(model(config, std=0.1), subnet)))
    idx = windows(config, 2)
    torch.nn.functional.cross_entropy(stock(idx).flatten(0, 1), idx.flatten()).backward()
    for part in ("transformer.h.2.attn", "transformer.h.2.norm_1", "transformer.h.1.mlp", "transformer.h.1.norm_2"):
        own = [parameter for name, parameter in stock.named_parameters() if name.startswith(part)]
        assert own and all(not weight.any() and (weight.grad is None or not weight.grad.any()) for weight in own)


def test_transformers_opens_the_padded_form(tmp_path):
    config = ARCHITECTURES["Llama-3.1-8B"]
    subnet = SubNet(config, **BOTH)
    save_checkpoint(tmp_path / "student", subnet, extract_weights(model(config, std=0.1), subnet))
    exported = export_hf(tmp_path / "student", tmp_path / "hf")
    assert exported.difference < 1e-5 and exported.n_params == n_params(config, SubNet.full(config))


@torch.no_grad()
def test_a_dropped_sub_layer_gets_zero_gradients_on_every_process(monkeypatch):
    """Processes that train other sub-networks in the same step need a gradient for each weight of a called block."""
    net, idx = super_gpt(model(LLAMA, std=0.1)).requires_grad_(True), windows(LLAMA, 2)
    monkeypatch.setattr(super_network.dist, "is_initialized", lambda: True)
    with torch.enable_grad(), net.running(SubNet(LLAMA, **BOTH), trains=True):
        net(idx).square().mean().backward()
    for part, is_used in (("2.attn", False), ("2.norm_1", False), ("1.mlp", False), ("2.mlp", True), ("1.attn", True)):
        own = [weight for name, weight in net.named_parameters() if name.startswith(f"transformer.h.{part}")]
        assert own and all(weight.grad is not None and bool(weight.grad.any()) == is_used for weight in own)


# repair ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "phi-2", "Gemma-2-2b", "Mixtral-8x7B-v0.1"])
def test_other_maps_make_up_for_dropped_sub_layers(name, tmp_path):
    config = ARCHITECTURES[name]
    teacher = model(config, std=0.1)
    quick = MomentRepair(super_gpt(teacher), windows(config, 128))
    for subnet in (SubNet(config, **BOTH), SubNet(config, drop_attention="0-0", drop_mlp="3-3", n_embd=28)):
        cut = distance(cut_of(teacher, subnet), teacher)
        full = distance(student_of(repair(teacher, subnet, tmp_path, n=128)), teacher)
        assert full < 0.6 * cut
        assert distance(quick.student(subnet), teacher) < full + 0.85 * (cut - full)


def test_the_moments_before_a_dropped_attention_are_those_of_its_tokens():
    teacher, ids = model(LLAMA, std=0.1), windows(LLAMA)
    repair_ = MomentRepair(super_gpt(teacher), ids, micro_batch_size=3)
    seen = watched(teacher, ids)
    for writer, start, after in (("mlp", "0.norm_2", "0"), ("attn", "0.norm_1", None)):
        yz, y = repair_._gap(0, (f"{writer}.proj",), 2, True)
        z, before = seen[f"transformer.h.0.{writer}.proj"][0], seen[f"transformer.h.{start}"][0]
        after = seen["transformer.h.0.norm_2"][0] if after is None else seen["transformer.h.0"][1]
        off = (seen["transformer.h.2.norm_2"][0] - before) / (after.square().mean(1, keepdim=True) + LLAMA.norm_eps)
        torch.testing.assert_close(yz.double(), off.T @ z, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(y.double(), off.sum(0), rtol=1e-4, atol=1e-3)


def test_an_interrupted_repair_without_some_sub_layers_resumes_to_the_same_result(tmp_path, monkeypatch):
    config = ARCHITECTURES["Gemma-2-2b"]
    teacher, subnet = model(config), SubNet(config, drop_attention="0,2", drop_mlp="1-1", n_embd=24)
    expected = repair(teacher, subnet, tmp_path / "whole")
    one = SequentialRepair._repair_layer
    for stop in (1, 2):  # the streams are those before a layer that begins with its MLP, and after it
        with monkeypatch.context() as patch:

            def dying(self, i, stop=stop):
                if i == stop:
                    raise KeyboardInterrupt
                return one(self, i)

            patch.setattr(SequentialRepair, "_repair_layer", dying)
            with pytest.raises(KeyboardInterrupt):
                repair(teacher, subnet, tmp_path)
    found = repair(teacher, subnet, tmp_path)
    assert found.subnet == expected.subnet and found.subnet.drop_mlp == subnet.drop_mlp
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())


def test_the_fitness_is_the_perplexity_of_the_repaired_student():
    net, ids = super_gpt(model(LLAMA)), windows(LLAMA, 8, 17, seed=3)
    fitness = RepairedPerplexity(net, [Batch(ids[:, :-1], ids[:, 1:])], calibration=windows(LLAMA))
    for subnet in (SubNet(LLAMA, drop_attention="3-3"), SubNet(LLAMA, **BOTH)):
        logits = fitness.repair.student(subnet)(ids[:, :-1])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert fitness(subnet)["nll"] == pytest.approx(float(expected), rel=1e-5)


# distillation ---------------------------------------------------------------------------------------------------------


def test_hidden_states_are_matched_where_there_is_attention():
    subnet = SubNet(LLAMA, drop_attention="1-1")
    student = student_model(subnet)
    loss = HiddenLoss(student, LLAMA, HiddenArgs(weight=1, attention=1), subnet)
    assert [place.layer for place in loss.pairs if place.kind == "attn"] == [0, 2, 3]
    assert sum(place.kind == "block" for place in loss.pairs) == 4
    with pytest.raises(UserError, match=r"needs a layer with attention, and the student's layers \[1\] have none"):
        HiddenLoss(student, LLAMA, HiddenArgs(attention=1, layers=[1]), subnet)


def test_a_student_without_some_sub_layers_is_distilled(tmp_path):
    teacher = checkpoint(tmp_path / "teacher", n_layer=3, n_embd=48)
    subnet = SubNet(config(n_layer=3, n_embd=48), drop_attention="1-1", drop_mlp="2-2")
    subnet.save(tmp_path / "sub_network.yaml")
    run(
        tmp_path / "out",
        teacher_checkpoint_dir=teacher,
        sub_network=tmp_path / "sub_network.yaml",
        distill=DistillArgs(hidden=HiddenArgs(weight=1.0, attention=1.0)),
        train=train_args(),
    )
    student = load_model(tmp_path / "out/final")
    assert isinstance(student, LayerwiseGPT) and num_parameters(student) == n_params(subnet.teacher, subnet)
    assert student.shape.drop_attention == subnet.drop_attention and student.shape.drop_mlp == subnet.drop_mlp
    cut = extract_weights(load_model(teacher), subnet)
    assert all(not torch.equal(weight, cut[name]) for name, weight in student.named_parameters())


def test_block_influence_counts_sub_layers_half():
    net = SuperGPT(LLAMA)
    of = BlockInfluence(net, importance=random_ranking(LLAMA))
    without_2, without_1 = (of(SubNet(LLAMA, n_layer=layers))["influence_lost"] for layers in ("0-1,3", "0,2-3"))
    assert of(SubNet(LLAMA, **BOTH))["influence_lost"] == pytest.approx((without_1 + without_2) / 2)


@pytest.mark.parametrize("config", [LLAMA, ARCHITECTURES["phi-2"]], ids=["Llama", "phi-2"])
@pytest.mark.parametrize("drop", DROPS)
def test_a_padded_student_without_a_sublayer_is_a_teacher_for_repairs(config, drop, tmp_path):
    """Its norm before the missing sub-layer is zero."""
    first = SubNet(config, **{drop: "1-1"})
    teacher = GPT(first.config).eval().requires_grad_(False)
    teacher.load_state_dict(pad(first, extract_weights(model(config, std=0.1), first)))
    subnet = SubNet(first.config, n_embd=3 * config.n_embd // 4)
    cut = distance(cut_of(teacher, subnet), teacher)
    assert distance(MomentRepair(super_gpt(teacher), windows(config, 128)).student(subnet), teacher) < cut
    assert distance(student_of(repair(teacher, subnet, tmp_path, n=128)), teacher) < cut


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_tokens_without_a_target_do_not_count_in_hidden_losses(loss):
    hidden = HiddenLoss.__new__(HiddenLoss)
    torch.nn.Module.__init__(hidden)
    hidden.args = HiddenArgs(weight=1.0, loss=loss)
    student, target = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    target[:, 1::2] = 0
    expected = hidden._distance(student[:, ::2], target[:, ::2], None)
    torch.testing.assert_close(hidden._distance(student, target, None), expected)
    assert hidden._distance(student, torch.zeros_like(target), None) == 0
