"""Test that a super-network computes the same as the extracted litgpt model of any of its sub-networks."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, subnets
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.config import Config
from litgpt.model import GPT
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_whittle import running
from litgpt_whittle import supergpt as super_network
from litgpt_whittle.checkpoint import load_model, save_checkpoint
from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import plan, plans
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, SuperGPT, extract_weights, pad, student_model, unpad

EACH = pytest.mark.parametrize("teacher", ARCHITECTURES.values(), ids=ARCHITECTURES)


def supergpt(config: Config, tied: bool = False, std: float = 0.2) -> SuperGPT:
    """Make a super-network with weights large enough that every part affects the output."""
    torch.manual_seed(0)
    model = SuperGPT(config)
    for name, tensor in model.state_dict().items():
        torch.nn.init.normal_(tensor, mean=1.0 if "norm" in name or "ln_f" in name else 0.0, std=std)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def tokens(config: Config, length: int = 16) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


def loss_of(logits: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten())


@EACH
def test_full_sub_network_is_litgpts_model(teacher):
    model, idx = supergpt(teacher), tokens(teacher)
    stock = GPT(teacher)
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = stock(idx)
        assert torch.equal(model(idx), expected)
        for materialize in (False, True):
            with model.running(SubNet.full(teacher), materialize=materialize):
                assert torch.equal(model(idx), expected)
        assert torch.equal(model(idx), expected), "running left something behind"


@EACH
@settings(max_examples=8)
@given(data=st.data())
def test_sub_network_equals_the_extracted_model_loaded_from_disk(teacher, data, tmp_path_factory):
    subnet, tied = data.draw(subnets(teacher, sublayers=True)), data.draw(st.booleans())
    model, idx = supergpt(teacher, tied), tokens(teacher)
    out_dir = tmp_path_factory.mktemp("student") / "student"
    save_checkpoint(out_dir, subnet, extract_weights(model, subnet))
    student = load_model(out_dir)
    assert type(student) is (GPT if subnet.is_uniform else LayerwiseGPT)
    if subnet.is_uniform:
        student = GPT(Config.from_checkpoint(out_dir))
        student.load_state_dict(torch.load(out_dir / "lit_model.pth", weights_only=True))
        if tied:
            student.lm_head.weight = student.transformer.wte.weight
    exact = subnet.is_uniform or teacher.norm_qk_type != "olmo2"  # padding rescales its norms, which rounds
    expected = student(idx)
    tolerance = 1e-5 if exact else 1e-4  # views of the teacher's weights have other strides, with which products round
    with model.running(subnet, materialize=True), torch.no_grad():
        torch.testing.assert_close(model(idx), expected, rtol=tolerance, atol=tolerance)
    loss_of(expected, idx).backward()
    with model.running(subnet):
        logits = model(idx)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    loss_of(logits, idx).backward()
    if exact:
        _assert_same_gradients(model, student, subnet, tied)


def _assert_same_gradients(model: SuperGPT, student: GPT, subnet: SubNet, tied: bool) -> None:
    """Assert that the teacher's gradient equals the student's on the plan's slices and is zero elsewhere."""
    theirs, ours = (dict(m.named_parameters(remove_duplicate=False)) for m in (student, model))
    slices = {name: take for name, take in plan(subnet.teacher, subnet, tied).items() if name in theirs}
    for name, take in slices.items():
        expected, got = theirs[name].grad, ours[take.name].grad
        if expected is None:  # an expert without tokens
            assert got is None or not got.any()
            continue
        torch.testing.assert_close(take(got), expected, rtol=1e-4, atol=1e-6)
        outside = torch.ones_like(got)
        index = [torch.arange(i.start, i.stop) if isinstance(i, slice) else i for i in take.index]
        outside[torch.meshgrid(*index, indexing="ij")] = 0
        assert not (got * outside).any(), f"{take.name} has gradient that {name} does not take"
    taken = {id(ours[take.name]) for take in slices.values()}
    assert all(parameter.grad is None for parameter in ours.values() if id(parameter) not in taken)


@EACH
@settings(max_examples=6)
@given(data=st.data())
def test_padded_export_gives_the_layerwise_logits(teacher, data):
    subnet = data.draw(subnets(teacher, uniform=False, sublayers=True))
    model, idx = supergpt(teacher, std=0.08), tokens(teacher)  # larger weights amplify rounding from layer to layer
    student = student_model(subnet)
    student.load_state_dict(extract_weights(model, subnet))
    padded = pad(subnet, student.state_dict())
    stock = GPT(subnet.config)
    stock.load_state_dict(padded)
    expected, got = student(idx), stock(idx)
    with torch.no_grad():  # fp32's own error: norms over two or three channels amplify rounding
        rounding = (copy.deepcopy(student).double()(idx) - expected).abs().max()
    torch.testing.assert_close(got, expected, rtol=0, atol=max(1e-5 * expected.abs().max().item(), 4 * rounding.item()))
    for name, weight in unpad(subnet, padded).items():
        torch.testing.assert_close(weight, student.state_dict()[name], rtol=1e-6, atol=1e-6)
    if not subnet.is_uniform:
        loss_of(got, idx).backward()
        _assert_padding_has_no_gradient(stock, student)


def _assert_padding_has_no_gradient(stock: GPT, student: LayerwiseGPT) -> None:
    slices = plan(stock.config, student.shape)
    for i in range(len(student.shape)):
        # a padded head of a kept group attends to that group's values, so its output projection gets a gradient
        if 0 < student.shape.layer(i).sizes[1] < stock.config.n_head // stock.config.n_query_groups:
            del slices[f"transformer.h.{i}.attn.proj.weight"]
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters() if parameter.grad is not None}
    for take in slices.values():
        # a padded head in a kept group averages that group's values, which its output projection reads
        shares_values = take.name.endswith("attn.proj.weight") and isinstance(student.shape.heads_per_group, tuple)
        if take.name in gradients and "norm_" not in take.name and not shares_values:
            inside = take(gradients[take.name])
            total = gradients[take.name].double().square().sum()
            torch.testing.assert_close(inside.double().square().sum(), total, rtol=1e-9, atol=1e-12)


def test_tied_head_gets_both_gradients():
    teacher = ARCHITECTURES["Gemma-2-2b"]
    model, idx = supergpt(teacher, tied=True), tokens(teacher)
    subnet = SubNet(teacher, n_embd="0-7,12-19", n_layer=2)
    student = student_model(subnet)
    student.lm_head.weight = student.transformer.wte.weight
    student.load_state_dict(extract_weights(model, subnet))
    loss_of(student(idx), idx).backward()
    with model.running(subnet):
        loss_of(model(idx), idx).backward()
    got = model.transformer.wte.weight.grad[:, subnet.n_embd.indices.tolist()]
    torch.testing.assert_close(got, student.transformer.wte.weight.grad, rtol=1e-4, atol=1e-6)


def test_extracting_leaves_the_teacher_alone():
    teacher = ARCHITECTURES["Llama-3.1-8B"]
    model = supergpt(teacher)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for weight in extract_weights(model, SubNet(teacher, n_layer=2)).values():
        weight.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_shorter_sequences_and_errors_leave_the_model_usable():
    teacher = ARCHITECTURES["Qwen3-0.6B"]
    model, idx = supergpt(teacher), tokens(teacher, 4)
    model.max_seq_length = 8
    full = model(idx)
    with pytest.raises(ValueError, match="Cannot forward"), model.running(SubNet(teacher, n_layer=2)):
        model(tokens(teacher, 16))
    assert torch.equal(model(idx), full)


def test_sub_network_of_another_teacher_is_refused():
    model = supergpt(ARCHITECTURES["Llama-3.1-8B"])
    with pytest.raises(UserError, match="belongs to"), model.running(SubNet(ARCHITECTURES["phi-2"])):
        pass


class Transfers(TorchDispatchMode):
    """Count copies from the CPU to the meta device, which stands in for a GPU."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if func._schema.name == "aten::copy_" else args[0]
            self.n += source.device.type == "cpu" and result.device.type == "meta"
        return result


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Gemma-3-1b-it", "phi-2"])
@pytest.mark.parametrize("mode", [{"materialize": True}, {"trains": True}, {}])
def test_indices_are_sent_to_the_device_in_one_copy_per_candidate(name, mode, monkeypatch):
    monkeypatch.setitem(super_network.KEPT_BYTES, "meta", 2**30)  # it has no free memory to query
    teacher = ARCHITECTURES[name]
    with torch.device("meta"):
        model = SuperGPT(teacher)
    idx = tokens(teacher).to("meta")
    subnet = SubNet(teacher, n_embd="1-9,12-30", n_layer="1,3", intermediate_size=["0-0,5-8", "0-0,6-8"])
    with Transfers() as transfers, model.running(subnet, **mode):
        n_sent = transfers.n
        for _ in range(2):
            model(idx).sum().backward() if "trains" in mode else model(idx)
    assert n_sent == transfers.n == 1


def test_a_gpu_keeps_gathered_weights_while_half_of_its_memory_is_free(monkeypatch):
    teacher = ARCHITECTURES["Llama-3.1-8B"]
    with torch.device("meta"):
        model = SuperGPT(teacher)
    subnet = SubNet(teacher, n_embd="1-9,12-30")
    gathered = [take for name, take in plan(teacher, subnet).items() if name != "transformer.wte.weight"]
    needed = sum(take.numel() for take in gathered) * 4
    for free, keeps_all in ((2 * needed, True), (2 * needed - 2, False)):
        monkeypatch.setattr(super_network, "free_memory", lambda device, n: free)
        with model.running(subnet, materialize=True):
            kept = [block._running.weights is not None for block in model.transformer.h]
        assert all(kept) == keeps_all and any(kept)


def test_layers_that_keep_the_same_units_share_their_plan():
    teacher = ARCHITECTURES["Llama-3.1-8B"]
    odd = "0-0,2-2,4-9"
    _, layers = plans(teacher, SubNet(teacher, n_embd="1-9", intermediate_size=[odd, 9, odd, "1-9"]))
    assert layers[0] is layers[2] and len({id(layer) for layer in layers}) == 3


def test_modules_are_built_once_for_layers_and_candidates_of_the_same_sizes(monkeypatch):
    built = []
    block = running.student_block
    monkeypatch.setattr(running, "student_block", lambda subnet, i: built.append(i) or block(subnet, i))
    teacher = ARCHITECTURES["Gemma-2-2b"]  # every second layer has a sliding window
    model, idx = supergpt(teacher).eval(), tokens(teacher)
    sizes = [9, 9, 9, 9], [9, 9, 12, 9], ["1-9", "0-8", "2-10", 9]
    for size, n_built in zip(sizes, (2, 3, 3)):
        subnet = SubNet(teacher, intermediate_size=size)
        student = student_model(subnet).eval()
        student.load_state_dict(extract_weights(model, subnet))
        with model.running(subnet, materialize=True), torch.no_grad():
            assert torch.equal(model(idx), student(idx))
        assert len(built) == n_built


def test_a_super_network_keeps_few_modules_and_computes_the_same(monkeypatch):
    monkeypatch.setattr(running, "MAX_KEPT", 2)
    teacher = ARCHITECTURES["Llama-3.1-8B"]
    model, idx = supergpt(teacher).eval(), tokens(teacher)
    for n_embd in (20, 24, 20):
        subnet = SubNet(teacher, n_embd=n_embd, intermediate_size=[7, 8, 9, 10])
        student = student_model(subnet).eval()
        student.load_state_dict(extract_weights(model, subnet))
        with model.running(subnet), torch.no_grad():
            assert torch.equal(model(idx), student(idx))
        assert len(model._modules_to_run._kept) == 2
