"""Test repairs of a cut: exact if nothing is lost, better than the cut otherwise, for every architecture."""

import dataclasses
import math

import pytest
import torch
from architectures import ARCHITECTURES, KINDS
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle.calibration import Calibration
from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.least_squares import Moments
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.repair.costs import sums_bytes
from litgpt_whittle.repair.repaired import Repaired
from litgpt_whittle.repair.sequential import SequentialRepair
from litgpt_whittle.scratch import Scratch
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import extract_weights, student_model

EACH = pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)


def model(config: Config, std: float = 0.3, tied: bool = False) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(config).eval().requires_grad_(False)
    for name, parameter in gpt.named_parameters():
        is_norm = "norm" in name or "ln_f" in name
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm and name.endswith("weight") else 0.0, std=std)
    if tied:
        gpt.lm_head.weight = gpt.transformer.wte.weight
    return gpt


def windows(config: Config, n: int = 64, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))


def repair(
    teacher: GPT, subnet: SubNet, folder, n: int = 64, length: int = 16, n_closed_form: int | None = None, **args
) -> Repaired:
    scratch = Scratch(folder / "scratch", "key")
    calibration = Calibration(windows(teacher.config, n, length), n_closed_form=n_closed_form)
    found = SequentialRepair(dict(teacher.state_dict()), subnet, calibration, RepairArgs(**args), scratch).run(
        progress=False
    )
    scratch.remove()
    return found


def student_of(repaired: Repaired) -> GPT:
    student = student_model(repaired.subnet).eval().requires_grad_(False)
    student.load_state_dict(repaired.weights)
    return student


def half(config: Config) -> SubNet:
    """Return half of every dimension that can be halved, and one layer less."""
    sizes = {"n_embd": config.n_embd // 2, "n_layer": f"0,2-{config.n_layer - 1}"}
    if config.n_query_groups > 1:
        sizes["n_query_groups"] = config.n_query_groups // 2
    elif config.n_head > 1:
        sizes["heads_per_group"] = config.n_head // 2
    is_moe = config.mlp_class_name == "LLaMAMoE"
    if not is_moe or config.first_k_dense_replace or config.moe_intermediate_size is None:
        sizes["intermediate_size"] = config.intermediate_size // 2
    if config.moe_intermediate_size is not None:
        sizes["moe_intermediate_size"] = config.moe_intermediate_size // 2
    return SubNet(config, **sizes)


def distance(student: GPT, teacher: GPT) -> float:
    """Return the mean squared error of the logits on unseen tokens, without each token's mean over the vocabulary."""
    idx = windows(teacher.config, 32, seed=1)
    off = student(idx) - teacher(idx)
    return float((off - off.mean(-1, keepdim=True)).square().mean())


def distance_of_cut(subnet: SubNet, teacher) -> float:
    cut = student_model(subnet).eval().requires_grad_(False)
    cut.load_state_dict(extract_weights(teacher, subnet))
    return distance(cut, teacher)


@EACH
def test_a_student_of_full_size_is_its_teacher(config, tmp_path):
    teacher = model(config, std=0.1)
    idx = windows(config, 4, seed=1)
    student = student_of(repair(teacher, SubNet.full(config), tmp_path))
    torch.testing.assert_close(student(idx), teacher(idx), rtol=1e-4, atol=1e-5)


@EACH
def test_blocks_that_lose_nothing_stay_whole(config, tmp_path):
    teacher = model(config, std=0.1)
    subnet = SubNet(config, n_layer=f"0-{config.n_layer - 2}")
    repaired = repair(teacher, subnet, tmp_path, n=128)
    assert all(layer.after < 1e-9 for layer in repaired.layers[:-1])
    assert repaired.layers[-1].after <= repaired.layers[-1].before
    assert distance(student_of(repaired), teacher) < distance_of_cut(subnet, teacher)


@pytest.mark.parametrize(
    "basis, config",
    [
        *(pytest.param("pca", config, id=name) for name, config in ARCHITECTURES.items()),
        *(pytest.param("coordinates", config, id=f"coordinates-{name}") for name, config in KINDS.items()),
    ],
)
def test_a_repaired_student_is_nearer_to_its_teacher_than_the_cut(config, basis, tmp_path):
    teacher, subnet = model(config), half(config)
    repaired = repair(teacher, subnet, tmp_path, basis=basis)
    student = student_of(repaired)
    assert n_params(config, repaired.subnet) == n_params(config, subnet) == sum(p.numel() for p in student.parameters())
    assert [layer.layer for layer in repaired.layers] == list(subnet.layers)
    assert all(math.isfinite(layer.after) for layer in repaired.layers)
    assert distance(student, teacher) < 0.8 * distance_of_cut(subnet, teacher)


def doubled(config: Config) -> tuple[GPT, GPT, SubNet]:
    """Return a model, an equivalent teacher with twice its channels, neurons and groups, and the cut between them."""
    small = model(config)
    wide = dataclasses.replace(
        config,
        n_embd=2 * config.n_embd,
        n_head=2 * config.n_head,
        n_query_groups=2 * config.n_query_groups,
        intermediate_size=2 * config.intermediate_size,
    )
    teacher = GPT(wide).eval().requires_grad_(False)
    size, groups = config.head_size, config.n_query_groups
    per_group = config.n_head // groups
    weights = {}
    for name, tensor in small.state_dict().items():
        if name.endswith(("attn.qkv.weight", "attn.qkv.bias")):
            # queries, keys and values are doubled separately
            parts = tensor.split([config.n_head * size, groups * size, groups * size])
            tensor = torch.cat([torch.cat([part, part]) for part in parts])
        elif ".fc" in name or (name.endswith(("proj.weight", "proj.bias", "wte.weight")) and "wte" not in name):
            tensor = torch.cat([tensor, tensor])
        elif "norm" in name or "ln_f" in name:
            tensor = torch.cat([tensor, tensor])
        if name.endswith("weight") and tensor.ndim == 2:
            # a projection with doubled inputs takes half of each; an embedding has doubled channels instead
            tensor = torch.cat([tensor, tensor], 1) * (1.0 if "wte" in name else 0.5)
        weights[name] = tensor
    assert per_group == wide.n_head // wide.n_query_groups
    teacher.load_state_dict(weights)
    cut = SubNet(
        wide,
        n_embd=config.n_embd,
        n_query_groups=groups,
        intermediate_size=config.intermediate_size,
    )
    return small, teacher, cut


@pytest.mark.parametrize("basis", ["pca", "coordinates"])
@pytest.mark.parametrize("name", ["pythia-14m", "Llama-3.1-8B", "yarn"])
def test_a_cut_that_loses_nothing_is_repaired_exactly(name, basis, tmp_path):
    config = ARCHITECTURES.get(name) or Config.from_name(
        name, n_layer=3, n_embd=32, n_head=4, intermediate_size=24, block_size=24, vocab_size=61, padded_vocab_size=64
    )
    small, teacher, cut = doubled(config)
    idx = windows(config, 8, seed=1)
    torch.testing.assert_close(teacher(idx), small(idx), rtol=1e-4, atol=1e-4)
    repaired = repair(teacher, cut, tmp_path, n=128, basis=basis)
    student = student_of(repaired)
    got, expected = (logits - logits.mean(-1, keepdim=True) for logits in (student(idx), teacher(idx)))
    assert (got - expected).norm() < 1e-4 * expected.norm()
    # one neuron and one query group of each pair of copies is kept
    for i in range(len(cut)):
        kept = repaired.subnet.layer(i)
        assert sorted(kept.intermediate_size.indices % config.intermediate_size) == list(
            range(config.intermediate_size)
        )
        assert sorted(kept.n_query_groups.indices % config.n_query_groups) == list(range(config.n_query_groups))


def test_tied_embeddings_stay_tied(tmp_path):
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher, subnet = model(config, tied=True), half(config)
    cut = student_model(subnet).eval().requires_grad_(False)
    cut.load_state_dict(extract_weights(teacher, subnet))
    for basis in ("pca", "coordinates"):
        repaired = repair(teacher, subnet, tmp_path, basis=basis)
        assert repaired.weights["lm_head.weight"] is repaired.weights["transformer.wte.weight"]
        assert distance(student_of(repaired), teacher) < distance(cut, teacher)


@pytest.mark.parametrize(
    "name", ["phi-2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Gemma-2-2b", "Mixtral-8x7B-v0.1"))]
)
def test_training_all_blocks_together_brings_predictions_nearer(name, tmp_path):
    config = ARCHITECTURES[name]
    teacher, subnet = model(config, std=0.1), half(config)
    refined = repair(teacher, subnet, tmp_path, n=128, refine_passes=2, refine_lr=1e-3)
    assert refined.refined.after < refined.refined.before
    # recomputed independently, with stock models on the held-out windows
    idx = windows(config, 128)[-8:]
    ours, theirs = (net(idx).double().log_softmax(-1) for net in (student_of(refined), teacher))
    assert float((theirs.exp() * (theirs - ours)).sum(-1).mean()) == pytest.approx(refined.refined.after, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_leading_copies_and_tied_embeddings_are_not_trained(tied, tmp_path):
    config = ARCHITECTURES["Llama-3.1-8B"]
    config = dataclasses.replace(config, n_layer=5)
    teacher = model(config, tied=tied)
    subnet = SubNet(config, n_layer="0-1,3-4")
    repaired = repair(teacher, subnet, tmp_path, refine_passes=2, refine_lr=3e-3)
    assert repaired.refined.after < repaired.refined.before
    theirs = teacher.state_dict()
    for name, weight in repaired.weights.items():
        is_kept = name.startswith("transformer.h.0.") or name == "transformer.wte.weight"
        assert torch.equal(weight, theirs[name]) or not is_kept
    assert torch.equal(repaired.weights["lm_head.weight"], theirs["lm_head.weight"]) == tied
    assert not torch.equal(
        repaired.weights["transformer.h.3.mlp.fc_1.weight"], theirs["transformer.h.4.mlp.fc_1.weight"]
    )


@pytest.mark.parametrize("layers", ["0-1,3-4", "1,3-4"])
def test_windows_beyond_the_closed_form_are_only_trained_on(layers, tmp_path):
    config = dataclasses.replace(ARCHITECTURES["Llama-3.1-8B"], n_layer=5)
    teacher, subnet = model(config, std=0.1), SubNet(config, n_layer=layers)
    more = repair(teacher, subnet, tmp_path, n=192, n_closed_form=48, refine_passes=1, refine_lr=1e-3)
    if layers.startswith("0"):  # means over all tokens replace dropped first layers
        alone = repair(teacher, subnet, tmp_path, n=48)
        assert (more.layers, more.head) == (alone.layers, alone.head)
    assert more.refined.after < more.refined.before
    # validated on the last windows of the closed form
    idx = windows(config, 192)[45:48]
    ours, theirs = (net(idx).double().log_softmax(-1) for net in (student_of(more), teacher))
    assert float((theirs.exp() * (theirs - ours)).sum(-1).mean()) == pytest.approx(more.refined.after, rel=1e-3)


def test_an_interrupted_training_of_all_blocks_goes_on_to_the_same_student(tmp_path, monkeypatch):
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher, subnet = model(config), half(config)
    expected = repair(teacher, subnet, tmp_path / "a", refine_passes=1)
    monkeypatch.setattr("litgpt_whittle.repair.refine.SECONDS_BETWEEN_SAVES", 0.0)
    save, n_saves = Scratch.save, iter(range(1000))

    def save_and_stop(scratch, name, content):
        save(scratch, name, content)
        if name == "end-to-end" and next(n_saves) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Scratch, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        repair(teacher, subnet, tmp_path / "b", refine_passes=1)
    found = repair(teacher, subnet, tmp_path / "b", refine_passes=1)
    assert found.refined == expected.refined
    assert all(torch.equal(found.weights[name], weight) for name, weight in expected.weights.items())


def watched(net: GPT, idx: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return inputs and outputs of each module of a model, tokens in rows, in float64."""
    seen, handles = {}, []
    for name, module in net.named_modules():

        def keep(_, inputs, output, name=name):
            if inputs and torch.is_tensor(output):
                seen[name] = tuple(x.double().flatten(0, -2) for x in (inputs[0], output))

        handles.append(module.register_forward_hook(keep))
    net(idx)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "phi-2"])
def test_every_map_is_the_least_squares_solution_on_its_own_inputs(name, tmp_path, monkeypatch):
    """With almost no ridge, against `torch.linalg.lstsq` in float64 on the finished student's own inputs."""
    config = ARCHITECTURES[name]
    monkeypatch.setattr("litgpt_whittle.repair.sequential.RIDGES", (1e-8,))
    teacher = model(config, std=0.1)
    channels, neurons = config.n_embd * 3 // 4, config.intermediate_size // 2
    subnet = SubNet(config, n_embd=channels, intermediate_size=neurons)
    student = student_of(repair(teacher, subnet, tmp_path, basis="coordinates", choose_units=False))
    idx = windows(config)
    idx = idx[: Calibration(idx).n_fitted // idx.shape[1]]
    theirs, ours = watched(teacher, idx), watched(student, idx)

    def check(names: list[str], wanted: torch.Tensor, stream: torch.Tensor | None = None) -> None:
        modules = [student.get_submodule(name) for name in names]
        z = torch.cat([ours[name][0] for name in names], 1)
        has_bias = modules[0].bias is not None
        if has_bias:
            z = torch.cat([z, torch.ones_like(z[:, :1])], 1)
        if stream is not None:  # errors are relative to the size of each token's stream
            size = stream.var(1, correction=0) if config.norm_class_name == "LayerNorm" else stream.square().mean(1)
            z, wanted = (x / (size + config.norm_eps).sqrt()[:, None] for x in (z, wanted))
        expected = torch.linalg.lstsq(z, wanted, rcond=1e-5, driver="gelsd").solution.T
        got = torch.cat([module.weight for module in modules], 1).double()
        if has_bias:
            got = torch.cat([got, sum(module.bias for module in modules)[:, None].double()], 1)
        # outputs are compared, because after a LayerNorm one direction of the weights is free
        torch.testing.assert_close(z @ got.T, z @ expected.T, rtol=0, atol=1e-3 * float(wanted.std()))

    for i, block in enumerate(student.transformer.h):
        at = f"transformer.h.{i}"
        check([f"{at}.attn.qkv"], theirs[f"{at}.attn.qkv"][1])
        for name, _ in block.mlp.named_children():
            if name != "proj":
                check([f"{at}.mlp.{name}"], theirs[f"{at}.mlp.{name}"][1][:, :neurons])
        behind = theirs[at][1][:, :channels]
        if config.parallel_residual:
            check([f"{at}.attn.proj", f"{at}.mlp.proj"], behind - ours[at][0], theirs[at][1])
        else:
            middle = theirs[f"{at}.norm_2"][0]
            check([f"{at}.attn.proj"], middle[:, :channels] - ours[at][0], middle)
            check([f"{at}.mlp.proj"], behind - ours[f"{at}.norm_2"][0], theirs[at][1])


def test_a_massive_token_does_not_draw_the_fits_to_itself(tmp_path, monkeypatch):
    """An MLP adds to one token a hundred times what it adds to others; weighting by size improves the others' fit."""
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher = model(config, std=0.1)
    embedding, mlp = teacher.transformer.wte.weight, teacher.transformer.h[0].mlp
    embedding[:, -1], embedding[0, -1] = 0.0, 1.0  # a channel that no other token uses
    for module in (mlp.fc_1, mlp.fc_2):
        module.weight[:, -1] *= 30
    calibration, unseen = windows(config, 256), windows(config, 64, seed=1)
    for idx in (calibration, unseen):
        idx[idx == 0] = 1
        idx[:, 8] = 0
    others = (unseen != 0).flatten()
    subnet = SubNet(config, intermediate_size=config.intermediate_size // 2)

    def errors_of_others() -> tuple[float, float]:
        """Return the other tokens' relative error of the stream after the first block, and that of the logits."""
        scratch = Scratch(tmp_path / "scratch", "key")
        found = SequentialRepair(
            dict(teacher.state_dict()), subnet, Calibration(calibration), RepairArgs(), scratch
        ).run(False)
        scratch.remove()
        ours, theirs = watched(student_of(found), unseen), watched(teacher, unseen)
        wanted = theirs["transformer.h.0"][1]
        assert wanted[~others].square().mean() > 100 * wanted[others].square().mean()
        stream = (ours["transformer.h.0"][1] - wanted).square().sum(1) / wanted.square().sum(1)
        logits = ours["lm_head"][1] - theirs["lm_head"][1]
        logits = (logits - logits.mean(1, keepdim=True)).square().mean(1)
        return float(stream[others].mean()), float(logits[others].mean())

    weighted = errors_of_others()
    for module in ("block", "streams"):
        monkeypatch.setattr(f"litgpt_whittle.repair.{module}.token_weights", lambda x, _: torch.ones(x.shape[:-1]))
    for with_weights, without in zip(weighted, errors_of_others()):
        assert with_weights < 0.9 * without


def test_a_massive_channel_does_not_matter(tmp_path):
    """A channel far from zero at every token is carried over, and the others are fitted as if it were absent."""
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher = model(config, std=0.1)
    teacher.transformer.wte.weight[:, 3] = 100.0
    for basis in ("pca", "coordinates"):
        student = student_of(repair(teacher, half(config), tmp_path, basis=basis))
        assert distance(student, teacher) < 0.8 * distance_of_cut(half(config), teacher)


def test_held_out_tokens_are_never_fitted_to(tmp_path):
    """Neither the student nor its reports depend on them, except for the validation figures."""
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher, subnet = model(config), half(config)
    ids = windows(config, 64)
    students = []
    for seed in (3, 4):
        other = ids.clone()
        n_fitted = Calibration(ids).n_fitted // ids.shape[1]
        other[n_fitted:] = windows(config, 64 - n_fitted, seed=seed)
        scratch = Scratch(tmp_path / "scratch", "key")
        args = RepairArgs(basis="coordinates", head_passes=0, choose_units=False)
        found = SequentialRepair(dict(teacher.state_dict()), subnet, Calibration(other), args, scratch).run(
            progress=False
        )
        scratch.remove()
        students.append(found.weights)
    for name, weight in students[0].items():
        torch.testing.assert_close(weight, students[1][name], rtol=0, atol=0)


def test_dropped_layers_are_stood_in_for(tmp_path):
    """The block before a gap learns the function of the dropped ones; the embedding learns that of the first ones."""
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher = model(config, std=0.1)
    for layers in ("0,2-3", "1-3"):
        subnet = SubNet(config, n_layer=layers)
        cut = student_model(subnet).eval().requires_grad_(False)
        cut.load_state_dict(extract_weights(teacher, subnet))
        repaired = repair(teacher, subnet, tmp_path)
        assert repaired.basis_name == "coordinates"  # no channel is cut
        assert distance(student_of(repaired), teacher) < 0.8 * distance(cut, teacher)


def test_an_interrupted_repair_goes_on_to_the_same_result(tmp_path, monkeypatch):
    config = ARCHITECTURES["Gemma-2-2b"] if "Gemma-2-2b" in ARCHITECTURES else ARCHITECTURES["Llama-3.1-8B"]
    teacher, subnet = model(config), half(config)
    expected = repair(teacher, subnet, tmp_path / "whole")
    done = []
    one = SequentialRepair._repair_layer

    def dying(self, i):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(i)
        return one(self, i)

    scratch = tmp_path / "scratch"
    with monkeypatch.context() as patch:
        patch.setattr(SequentialRepair, "_repair_layer", dying)
        with pytest.raises(KeyboardInterrupt):
            repair(teacher, subnet, tmp_path)
    monkeypatch.setattr(SequentialRepair, "_repair_layer", lambda self, i: done.append(i) or one(self, i))
    found = repair(teacher, subnet, tmp_path)
    assert done == list(range(len(subnet))) and not scratch.exists()
    assert found.subnet == expected.subnet and found.layers == expected.layers
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())


def test_other_work_in_the_scratch_folder_is_thrown_away(tmp_path):
    one = Scratch(tmp_path / "s", "one")
    one.save("basis", {"matrix": torch.ones(1)})
    assert Scratch(tmp_path / "s", "one").load("basis") is not None
    assert Scratch(tmp_path / "s", "two").load("basis") is None


def test_few_tokens_are_warned_about_and_stay_near_the_cut(tmp_path):
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher, subnet = model(config), half(config)
    with pytest.warns(UserWarning, match="fewer than the 32 inputs of the widest map"):
        repaired = repair(teacher, subnet, tmp_path, n=3, length=8)
    assert all(math.isfinite(layer.after) for layer in repaired.layers)
    with pytest.raises(UserError, match="at least 3 windows"):
        repair(teacher, subnet, tmp_path, n=2)


@pytest.mark.parametrize("basis", ["pca", "coordinates"])
@pytest.mark.parametrize("broken", [1, 2])
def test_activations_that_are_not_finite_name_their_layer(tmp_path, basis, broken):
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher, subnet = model(config), half(config)
    assert 1 not in subnet.layers and 2 in subnet.layers
    teacher.transformer.h[broken].mlp.proj.weight[0, 0] = math.inf
    with pytest.raises(UserError, match=f"layer {broken} gives activations that are not finite"):
        repair(teacher, subnet, tmp_path, basis=basis)


def test_what_cannot_be_fitted_is_listed(tmp_path):
    config = ARCHITECTURES["Mixtral-8x7B-v0.1"]
    with pytest.warns(UserWarning, match="fewer than"):
        repaired = repair(model(config), SubNet(config, n_embd=config.n_embd // 2), tmp_path, n=3, length=4)
    assert all(
        f"mlp.experts.{j}.proj" in layer.left_as_cut for layer in repaired.layers for j in range(config.n_expert)
    )
    config = ARCHITECTURES["Llama-3.1-8B"]
    repaired = repair(model(config, tied=True), SubNet(config, n_layer="1-2"), tmp_path)
    stands_in = [any("embedding" in what for what in layer.left_as_cut) for layer in repaired.layers]
    assert stands_in == [True, False]


def test_maps_that_no_ridge_helps_are_listed(tmp_path, monkeypatch):
    config = ARCHITECTURES["Llama-3.1-8B"]
    monkeypatch.setattr("litgpt_whittle.repair.sequential.RIDGES", (math.inf,))
    repaired = repair(model(config, std=0.1), half(config), tmp_path)
    assert set(repaired.layers[0].left_as_cut) == {"attn.qkv", "attn.proj", "mlp.fc_1", "mlp.fc_2", "mlp.proj"}


def test_maps_too_wide_for_the_memory_are_refused(tmp_path, monkeypatch):
    config = ARCHITECTURES["Llama-3.1-8B"]
    monkeypatch.setattr("litgpt_whittle.repair.costs.free_memory", lambda *_: 10_000)
    with pytest.raises(UserError, match="the repair takes .* for the moments of its widest maps, and .* are free"):
        repair(model(config), half(config), tmp_path)


def test_products_are_exact_in_a_repair(tmp_path, monkeypatch):
    """litgpt's command line lets GPUs round; a repair does not, and restores the setting."""
    seen, config = [], ARCHITECTURES["Llama-3.1-8B"]
    add = Moments.add

    def watched(*args):
        seen.append(torch.get_float32_matmul_precision())
        add(*args)

    monkeypatch.setattr(Moments, "add", watched)
    torch.set_float32_matmul_precision("high")
    try:
        repair(model(config), half(config), tmp_path)
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"basis": "fourier"}, "repair.basis must be pca or coordinates"),
        ({"tokens": 0}, "repair.tokens must be at least 1"),
        ({"refine_passes": -1}, "repair.refine_passes must be 0 or more"),
        ({"refine_lr": 0.0}, "repair.refine_lr must be above 0"),
        ({"refine_lr": 1e-3}, "repair.refine_lr has no effect without repair.refine_passes, got 0.001"),
        (
            {"closed_form_tokens": 4096},
            "repair.closed_form_tokens must be at least 1 and needs repair.refine_passes above 0",
        ),
        ({"head_passes": -1}, "repair.head_passes must be 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        RepairArgs(**args)


def test_memory_is_asked_for_all_moments_that_are_kept_at_once(tmp_path, monkeypatch):
    """The selection of a wide teacher's units uses moments of all units, however few are kept."""
    config = Config.from_name(
        "Llama-3.2-1B", n_layer=2, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=512, block_size=24,
        vocab_size=61, padded_vocab_size=64,
    )  # fmt: skip
    made, begin = [], Moments.__init__

    def watched(self, n_in, n_out, *args, **kwargs):
        begin(self, n_in, n_out, *args, **kwargs)
        made.append(self.zz.nbytes + self.yz.nbytes)

    monkeypatch.setattr(Moments, "__init__", watched)
    subnet = SubNet(config, n_embd=16, intermediate_size=32)
    repair(model(config, std=0.1), subnet, tmp_path)
    with_choice, without = (sums_bytes(subnet, chooses, torch.device("cpu")) for chooses in (True, False))
    assert without < max(made) <= with_choice
