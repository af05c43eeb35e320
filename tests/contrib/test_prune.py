"""Test pruning: exact numbers of zeros, brute-force masks and weights, every architecture, the command."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from architectures import ARCHITECTURES, KINDS
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import save_config
from test_repair import model, windows
from texts import documents, write_jsonl, write_tokenizer

from litgpt_whittle import registry
from litgpt_whittle.batches import (
    BatchArgs,
    BudgetArgs,
)
from litgpt_whittle.checkpoint import load_model, save_checkpoint
from litgpt_whittle.commands.prune import setup
from litgpt_whittle.contrib.prune import Magnitude, SparseGPT, Sparsity, Wanda
from litgpt_whittle.contrib.prune.pruning import Pruning, maps_to_prune, refit, relative_error
from litgpt_whittle.data import HFText
from litgpt_whittle.errors import UserError
from litgpt_whittle.scratch import Scratch
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import extract_weights, is_tied
from litgpt_whittle.testing.pruners import CHECKS, moments_of, problem

PRUNERS = (Magnitude, Wanda, SparseGPT)
EACH = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("name", registry.names("litgpt_whittle.pruners"))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_pruner_keeps_the_rules(name, check):
    check(registry.lookup("litgpt_whittle.pruners", name))


@pytest.mark.parametrize(
    "settings", [{"block_size": 1}, {"block_size": 7}, {"block_size": 20}, {"damp": 1e-30}], ids=str
)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_settings_of_sparsegpt_keep_the_rules(settings, check):
    check(partial(SparseGPT, **settings))


@pytest.mark.parametrize("share", [0.07, 0.31, 0.5, 0.93])
def test_wanda_drops_the_share_of_each_output_and_the_others_that_of_the_map(share):
    weight, x = problem(9, 40)
    for pruner in PRUNERS:
        n_zero = (pruner(Sparsity(share)).prune(weight, moments_of(x)) == 0).sum(1)
        assert n_zero.eq(round(share * 40)).all() if pruner is Wanda else n_zero.sum() == round(share * 9 * 40)


# -- pruned weights, and changes of the others


@pytest.mark.parametrize("sparsity", [Sparsity(0.4), Sparsity.parse(None, "1:4")], ids=str)
def test_wanda_drops_the_smallest_products_of_weight_and_input(sparsity):
    weight, x = problem(6, 20)
    pruned = Wanda(sparsity).prune(weight, moments_of(x))
    for row, left in zip(weight.tolist(), pruned.tolist()):
        scores = [abs(w) * float(x[:, j].double().norm()) for j, w in enumerate(row)]
        size, n_drop = (4, 3) if sparsity.pattern else (20, 8)
        for begin in range(0, 20, size):
            group = sorted(range(begin, begin + size), key=scores.__getitem__)
            assert all(left[j] == 0 for j in group[:n_drop])
            assert all(left[j] == row[j] for j in group[n_drop:])


@pytest.mark.parametrize("sparsity", [Sparsity(0.4), Sparsity.parse(None, "1:4")], ids=str)
def test_magnitude_drops_the_smallest_weights(sparsity):
    weight, _ = problem(6, 20)
    pruned = Magnitude(sparsity).prune(weight, None)
    groups = weight.reshape(30, 4) if sparsity.pattern else weight.reshape(1, 120)
    n_drop = 3 if sparsity.pattern else 48
    limits = groups.abs().sort(1).values[:, n_drop - 1, None]
    assert torch.equal(pruned.view_as(groups), torch.where(groups.abs() > limits, groups, 0))


def surgery(weight, x, sparsity, damp, block_size):
    """Run optimal brain surgery in the order of the inputs, inverting the remaining ones' Hessian at each step."""
    w, n_in = weight.double(), weight.shape[1]
    hessian = x.double().T @ x.double() / len(x)
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(n_in, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(n_in)]
    costs = torch.tensor([float(inverse[0, 0]) for inverse in inverses])
    drop = torch.zeros_like(w, dtype=torch.bool)
    size = sparsity.pattern[1] if sparsity.pattern else block_size
    for j in range(n_in):
        if j % size == 0:
            score = w[:, j : j + size].square() / costs[j : j + size]
            if sparsity.pattern:
                order = score.argsort(1)[:, : size - sparsity.pattern[0]]
                drop[:, j : j + size] = torch.zeros_like(score, dtype=torch.bool).scatter(1, order, True)
            else:
                n_drop = round(sparsity.share * score.numel())
                drop[:, j : j + size] = score <= score.flatten().sort().values[n_drop - 1]
        for row in range(len(w)):
            if drop[row, j]:
                w[row, j:] -= w[row, j] / inverses[j][0, 0] * inverses[j][0]
                w[row, j] = 0
    return w


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity.parse(None, "2:4"), Sparsity.parse(None, "1:3")], ids=str)
@pytest.mark.parametrize("block_size", [24, 12])
def test_sparsegpt_is_optimal_brain_surgery_in_the_order_of_the_inputs(sparsity, block_size):
    weight, x = problem(10, 24)
    pruned = SparseGPT(sparsity, 0.02, block_size).prune(weight.double(), moments_of(x))
    torch.testing.assert_close(pruned, surgery(weight, x, sparsity, 0.02, block_size), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity.parse(None, "2:4")], ids=str)
def test_what_knows_more_loses_less(sparsity):
    for seed in range(3):
        weight, x = problem(64, 96, 2000, seed)
        moments = moments_of(x)
        found = [pruner(sparsity).prune(weight, moments) for pruner in PRUNERS]
        errors = [float(((pruned - weight) @ x.T).square().sum() / (weight @ x.T).square().sum()) for pruned in found]
        assert errors == pytest.approx([relative_error(weight, pruned, moments) for pruned in found], rel=1e-3)
        assert errors[2] < errors[1] < errors[0]
        refitted = [relative_error(weight, refit(weight, pruned, moments), moments) for pruned in found]
        assert refitted[0] < errors[0] and refitted[1] < errors[1] and refitted[2] < errors[2]


def test_a_refit_is_least_squares_on_what_stays():
    weight, x = problem(5, 16)
    pruned = Wanda(Sparsity(0.5)).prune(weight, moments_of(x))
    fitted = refit(weight, pruned, moments_of(x))
    assert torch.equal(fitted == 0, pruned == 0)
    for row, found in zip(weight, fitted):
        kept = found != 0
        z, y = x[:, kept].double(), x.double() @ row.double()
        ridge = torch.diag(1e-3 * z.square().sum(0))
        expected = torch.linalg.solve(z.T @ z + ridge, z.T @ y + ridge @ row[kept].double())
        torch.testing.assert_close(found[kept].double(), expected, rtol=1e-4, atol=1e-5)


# -- a full model


def pruned(teacher: GPT, folder, pruner=Wanda, n: int = 12, size: int = 4, ids=None, **changes):
    """Return the weights and reports of a model pruned to one half."""
    shape = SubNet.full(teacher.config)
    maps = maps_to_prune(shape, ["attn", "mlp"], Sparsity())
    scratch = Scratch(folder / "scratch", "key")
    ids = windows(teacher.config, n) if ids is None else ids
    run = Pruning(shape, teacher.state_dict(), maps, pruner(Sparsity()), scratch, ids, size, **changes)
    found = run.run(progress=False)
    scratch.remove()
    return found


@EACH
def test_all_architectures_lose_half_of_their_maps_and_nothing_else(config, tmp_path):
    teacher = model(config)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    weights, reports = pruned(teacher, tmp_path, SparseGPT, n=4)
    stock = GPT(config)
    stock.load_state_dict(weights)
    assert stock(windows(config, 2)).isfinite().all()
    of_maps = {f"transformer.h.{report.layer}.{report.name}.weight": report for report in reports}
    linear = {name for name, module in teacher.transformer.h.named_modules() if isinstance(module, torch.nn.Linear)}
    routers = {name for name in linear if name.endswith("mlp.gate")}
    assert set(of_maps) == {f"transformer.h.{name}.weight" for name in linear - routers}
    for name, tensor in weights.items():
        assert torch.equal(teacher.state_dict()[name], before[name])  # the input weights are unchanged
        if name in of_maps:
            n_zero = int((tensor == 0).sum())
            assert n_zero == of_maps[name].n_zero == round(tensor.numel() / 2)
        else:
            assert torch.equal(tensor, before[name])


@torch.no_grad()
def test_each_block_is_pruned_for_what_the_pruned_ones_before_it_compute(tmp_path):
    config = ARCHITECTURES["Llama-3.1-8B"]
    teacher, ids = model(config), windows(config, 12)
    weights, reports = pruned(teacher, tmp_path, ids=ids)
    student = GPT(config)
    student.load_state_dict(weights)
    whole, part = teacher.transformer.h[2], student.transformer.h[2]
    seen = []
    part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    student(ids)
    inputs = {}
    for name in ("attn.qkv", "attn.proj", "mlp.fc_1", "mlp.fc_2", "mlp.proj"):
        note = lambda _, x, name=name: inputs.update({name: x[0].flatten(0, 1)})
        whole.get_submodule(name).register_forward_pre_hook(note)
    whole(*seen[0])
    for name, x in inputs.items():
        weight = whole.get_submodule(name).weight
        expected = Wanda(Sparsity()).prune(weight, moments_of(x))
        assert torch.equal(part.get_submodule(name).weight, expected)
        (report,) = [report for report in reports if (report.layer, report.name) == (2, name)]
        assert report.error == pytest.approx(relative_error(weight, expected, moments_of(x)), rel=1e-4)


def test_all_samples_count_however_they_are_batched(tmp_path):
    teacher = model(ARCHITECTURES["Llama-3.1-8B"], std=0.1)
    one, many, fewer = (pruned(teacher, tmp_path, SparseGPT, **how)[1] for how in ({"size": 12}, {"size": 5}, {"n": 8}))
    errors = [[report.error for report in found] for found in (one, many, fewer)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-2) and errors[2] != pytest.approx(errors[0], rel=1e-2)


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_named(tmp_path):
    config = ARCHITECTURES["Mixtral-8x7B-v0.1"]
    teacher = model(config)
    # the router never sends this token to the last two experts
    ids = torch.zeros(2, 16, dtype=torch.long)
    weights, reports = pruned(teacher, tmp_path, SparseGPT, ids=ids)
    unseen = [report for report in reports if not report.saw_tokens]
    assert unseen and all(report.name.startswith("mlp.experts.") and report.error is None for report in unseen)
    for report in unseen:
        name = f"transformer.h.{report.layer}.{report.name}.weight"
        assert torch.equal(weights[name], Magnitude(Sparsity()).prune(teacher.state_dict()[name], None))


def test_interrupted_pruning_goes_on_to_the_same_result(tmp_path, monkeypatch):
    teacher = model(ARCHITECTURES["Llama-3.1-8B"])
    expected, reports = pruned(teacher, tmp_path)
    done, one = [], Pruning._prune_layer

    def dying(self, i):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(i)
        return one(self, i)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pruning, "_prune_layer", dying)
        pruned(teacher, tmp_path)
    monkeypatch.setattr(Pruning, "_prune_layer", lambda self, i: done.append(i) or one(self, i))
    found, again = pruned(teacher, tmp_path)
    assert done == [0, 1, 2, 3] and again == reports
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_activations_that_are_not_finite_name_their_map(tmp_path):
    teacher = model(ARCHITECTURES["Llama-3.1-8B"])
    teacher.transformer.h[2].norm_1.weight[0] = torch.inf
    with pytest.raises(UserError, match="the input of attn.qkv in layer 2 is not finite"):
        pruned(teacher, tmp_path)


# -- the command

CONFIG = Config.from_name(
    "Llama-3.2-1B",
    n_layer=2,
    n_embd=32,
    n_head=4,
    n_query_groups=2,
    intermediate_size=44,
    block_size=64,
    vocab_size=300,
    padded_vocab_size=300,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a checkpoint and its data."""
    folder = tmp_path_factory.mktemp("prune")
    write_tokenizer(folder / "model")
    tied = model(CONFIG, 0.2, tied=True).to(torch.bfloat16)
    torch.save(tied.state_dict(), folder / "model/lit_model.pth")
    save_config(CONFIG, folder / "model")
    write_jsonl(folder / "train.jsonl", documents(200))
    write_jsonl(folder / "validation.jsonl", documents(40, seed=1))
    return folder


def prune(folder, out_dir, checkpoint="model", **changes):
    given = {
        "data": HFText(path=str(folder / "train.jsonl"), val_path=str(folder / "validation.jsonl")),
        "tokens": 2000,
        "train": BatchArgs(micro_batch_size=8),
        "eval": BudgetArgs(max_iters=2),
    }
    setup(folder / checkpoint, out_dir, **given | changes)
    return torch.load(out_dir / "lit_model.pth", weights_only=True)


@pytest.mark.pictures
def test_stock_litgpt_opens_a_pruned_checkpoint(folder, tmp_path, capsys):
    weights = prune(folder, tmp_path / "out", pattern="2:4")
    printed = capsys.readouterr().out
    stock = GPT(Config.from_checkpoint(tmp_path / "out"))
    stock.load_state_dict(weights)
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values()) and is_tied(weights)
    for name, tensor in weights.items():
        if name.startswith("transformer.h.") and "norm" not in name:
            assert ((tensor == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert torch.equal(weights["lm_head.weight"], torch.load(folder / "model/lit_model.pth")["lm_head.weight"])
    notes = yaml.safe_load((tmp_path / "out/pruning.yaml").read_text())
    assert notes["method"] == {"sparsegpt": {"damp": 0.01, "block_size": 128}}
    assert notes["pattern"] == "2:4" and notes["tokens"] == 2048 and notes["saw_no_tokens"] == []
    before, after = notes["perplexity_before"], notes["perplexity"]
    assert f"perplexity {before:.2f} -> {after:.2f}" in printed and "50.00%" in printed
    assert (tmp_path / "out/pruning.png").stat().st_size > 10_000 and (tmp_path / "out/tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    # pruning again with the same pattern loses nothing
    again = prune(folder, tmp_path / "again", tmp_path / "out", pattern="2:4", method="wanda", targets="mlp.fc_1,attn")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    notes = yaml.safe_load((tmp_path / "again/pruning.yaml").read_text())
    assert notes["perplexity_before"] == notes["perplexity"] == after


def test_magnitude_needs_no_data(folder, tmp_path, capsys):
    weights = prune(folder, tmp_path / "out", data=None, method="magnitude", sparsity=0.25, targets="mlp.proj")
    out = capsys.readouterr().out
    assert "unknown" in out and "Perplexity was not measured" in out and not (tmp_path / "out/pruning.png").exists()
    zeros = {name: int((tensor == 0).sum()) for name, tensor in weights.items()}
    assert {name for name, n in zeros.items() if n} == {f"transformer.h.{i}.mlp.proj.weight" for i in range(2)}
    assert zeros["transformer.h.0.mlp.proj.weight"] == 32 * 44 // 4


def test_a_student_whose_layers_differ_is_pruned_in_its_true_shape(folder, tmp_path):
    subnet = SubNet(CONFIG, n_embd=24, intermediate_size=[20, 32], n_query_groups=[1, 2])
    weights = extract_weights(torch.load(folder / "model/lit_model.pth"), subnet)
    basis = {"basis.pth": {"basis": torch.eye(24, 32)}}
    save_checkpoint(tmp_path / "student", subnet, weights, folder / "model", subnet.to_dict(), basis)
    prune(folder, tmp_path / "out", tmp_path / "student", method="wanda", sparsity=0.5)
    opened = load_model(tmp_path / "out")
    for block in opened.transformer.h:
        for name in ("attn.qkv", "attn.proj", "mlp.fc_1", "mlp.proj"):
            weight = block.get_submodule(name).weight
            assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()
    assert [block.mlp.proj.in_features for block in opened.transformer.h] == [20, 32]
    # its sub-network is kept, so it can be distilled from its teacher
    assert SubNet.load(tmp_path / "out/sub_network.yaml", CONFIG) == subnet and (tmp_path / "out/basis.pth").is_file()


@pytest.mark.slow
def test_the_command_line_takes_patterns_and_settings_of_methods(folder, tmp_path):
    (tmp_path / "settings.yaml").write_text("pattern: 2:4\nmethod: {sparsegpt: {damp: 0.1}}\ntargets: mlp.fc_1,attn\n")
    command = [sys.executable, "-m", "litgpt_whittle", "prune", folder / "model", f"--config={tmp_path}/settings.yaml"]
    command += [f"--out_dir={tmp_path}/out", "--data=HFText", f"--data.path={folder}/train.jsonl", "--tokens=2000"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0 and "mlp.fc_1" in done.stdout, done.stderr
    notes = yaml.safe_load((tmp_path / "out/pruning.yaml").read_text())
    assert notes["pattern"] == "2:4" and notes["method"] == {"sparsegpt": {"damp": 0.1, "block_size": 128}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "4:2"}, "pattern must be N:M .keep N of every M. with 0 < N < M, got '4:2'; try 2:4"),
        ({"pattern": "half"}, "pattern must be N:M"),
        ({"pattern": "3:5"}, "pattern 3:5 needs a multiple of 5 inputs, attn.qkv of layer 0 has 32; choose another"),
        ({"sparsity": 1.2}, "sparsity must lie between 0 and 1, got 1.2"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "sparsity and pattern both set the share of pruned weights"),
        ({"method": "wanda", "data": None}, "the method wanda needs data to calibrate on; for example --data HFText"),
        ({"method": "magnitude", "refit": True, "data": None}, "refit needs data to calibrate on"),
        ({"method": "lottery"}, "there is no 'lottery' in litgpt_whittle.pruners; choose from magnitude, sparsegpt"),
        ({"method": {"wanda": {"damp": 1.0}}}, "the method wanda has no setting 'damp'; it takes none"),
        ({"method": {"sparsegpt": {"damp": 0.0}}}, "method.damp must be above 0"),
        ({"method": {"sparsegpt": {"block_size": 0}}}, "method.block_size must be at least 1"),
        ({"method": {"sparsegpt": {"damp": "x"}}}, "method.damp must be above 0, got 'x'; 0.01"),
        (
            {"method": {"sparsegpt": {"block_size": "x"}}},
            "method.block_size must be a whole number, at least 1, got 'x'",
        ),
        ({"sparsity": 1e-8}, "sparsity must prune at least one weight, got 1e-08 of at most"),
        ({"targets": "head"}, "targets must be attn, mlp or some of attn.qkv, attn.proj, mlp.fc_1, .* got 'head'"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"train": BatchArgs(max_seq_length=65)}, "at most the teacher's block_size 64, got 65"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        prune(folder, tmp_path / "out", **changes)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_yaml_may_leave_out_the_quotes():
    assert Sparsity.parse(None, yaml.safe_load("2:4")) == Sparsity(0.5, (2, 4))
