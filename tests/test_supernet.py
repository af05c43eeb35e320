"""Test super-network training against gradients of extracted models, and one process against two."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT, Config
from litgpt.args import EvalArgs
from test_train import TokenData, checkpoint, config, predict, rows, same, train_args
from torch.utils.data import DataLoader

from litgpt_whittle import SubNet, load_model, registry
from litgpt_whittle.commands.pretrain_supernet import setup
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.errors import UserError
from litgpt_whittle.index_plan import plan
from litgpt_whittle.samplers import (
    Alternate,
    InPlaceDistillation,
    RandomLinear,
    Sampler,
    Sandwich,
    SizeWeighted,
    Standard,
    Uniform,
)
from litgpt_whittle.spaces.args import (
    SizeArgs,
    SpaceArgs,
)
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.supergpt import SuperGPT, extract_weights, student_model
from litgpt_whittle.supernet import (
    SuperLossModel,
    SupernetArgs,
    SupernetStep,
)
from litgpt_whittle.testing.samplers import CHECKS
from litgpt_whittle.training.live_bytes import LiveBytes
from litgpt_whittle.unit_index import UnitIndex

SEARCH_SPACE = SpaceArgs(smallest=SizeArgs(n_embd=16, n_query_groups=1, intermediate_size=32))
TINY = {"n_layer": 3, "n_embd": 32, "n_head": 4, "block_size": 8, "padded_vocab_size": 50, "vocab_size": 50}
FAMILIES = {
    "pythia": Config(**TINY),
    "llama": Config(
        **TINY, n_query_groups=2, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=64
    ),
    "gemma": Config(
        **TINY, final_logit_softcapping=3.0, scale_embeddings=True, norm_class_name="RMSNorm", bias=False,
        mlp_class_name="GemmaMLP", intermediate_size=64, parallel_residual=False, post_mlp_norm=True,
    ),
}  # fmt: skip


def space(teacher: Config = FAMILIES["pythia"], name: str = "fine_layerwise") -> Space:
    return Space(teacher, name, args=SEARCH_SPACE)


class Given(Sampler):
    """Sample the given networks in every step."""

    def __init__(self, networks, teaches=False):
        self.given, self.teaches = networks, teaches

    def networks(self, rng, step, done):
        return self.given


def step_of(model: SuperGPT, sampler: Sampler, objective=Objective(0.0, 1.0, 1.0)) -> SupernetStep:
    root = SuperLossModel(model)
    return SupernetStep(root, root, sampler, lambda done: objective, seed=0, n_iters=10, accumulation=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("teaches", [False, True])
def test_a_steps_gradients_are_the_mean_of_those_of_extracted_models(family, teaches):
    torch.manual_seed(0)
    teacher = FAMILIES[family]
    model = SuperGPT(teacher).double()
    ids, targets = torch.randint(50, (2, 2, 8))
    rng = np.random.default_rng(0)
    networks = [None, space(teacher).smallest(), *(space(teacher).sample(rng) for _ in range(2))]
    objective = Objective(alpha=0.3, beta=0.7, temperature=2.0)
    scalars = step_of(model, Given(networks, teaches), objective)(ids, targets, lambda loss: loss.backward(), 0.0)

    whole = GPT(teacher).double()
    whole.load_state_dict(model.state_dict())
    with torch.no_grad():
        said = F.log_softmax(whole(ids) / 2.0, dim=-1)
    expected = {name: torch.zeros_like(weight) for name, weight in whole.named_parameters()}
    losses = []
    for network in networks:
        subnet = network or SubNet.full(teacher)
        student = student_model(subnet).double()
        student.load_state_dict(extract_weights(model, subnet))
        logits = student(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if teaches and network is not None:
            kl = (said.exp() * (said - F.log_softmax(logits / 2.0, dim=-1))).sum(-1).mean()
            loss = 0.3 * loss + 0.7 * 4.0 * kl
        (loss / len(networks)).backward()
        losses.append(loss.item())
        for name, take in plan(teacher, subnet).items():
            index = [torch.arange(n)[i] for i, n in zip(take.index, expected[take.name].shape)]
            grid = torch.meshgrid(*index, indexing="ij") if index else ()
            expected[take.name][grid] += student.get_parameter(name).grad
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.grad, expected[name], atol=1e-10), name
    assert float(scalars["loss"]) == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert float(scalars["full"]) == pytest.approx(losses[0], rel=1e-9)


def test_layers_that_no_network_uses_get_gradients_of_zero():
    model = SuperGPT(FAMILIES["pythia"])
    ids = torch.zeros(1, 8, dtype=torch.long)
    for layers in ([0], [1], [2], [0, 2]):
        model.zero_grad()
        subnet = SubNet(model.config, n_layer=UnitIndex(np.array(layers)))
        step_of(model, Given([subnet]))(ids, ids, lambda loss: loss.backward(), 0.0)
        for i, block in enumerate(model.transformer.h):
            grads = [weight.grad for weight in block.parameters()]
            assert all(grad is not None for grad in grads)
            assert any(bool(grad.any()) for grad in grads) == (i in subnet.layers)
        assert model._running is None and all(block._running is None for block in model.transformer.h)


def test_a_sandwich_takes_the_memory_of_its_largest_network():
    model = SuperGPT(FAMILIES["pythia"])
    ids = torch.randint(50, (64, 8))

    def peak(sampler: Sampler) -> int:
        step = step_of(model, sampler)
        step(ids, ids, lambda loss: loss.backward(), 0.0)  # allocates the gradients
        with LiveBytes() as live:
            step(ids, ids, lambda loss: loss.backward(), 0.0)
        return live.peak

    one = peak(Given([None]))
    assert peak(Given([None, *[space().smallest()] * 4])) <= 1.02 * one
    assert peak(Given([None, space().smallest()], teaches=True)) <= 1.1 * one


# -- samplers


def networks_of(sampler: Sampler, n: int, steps=1000):
    return [sampler.networks(np.random.default_rng(i), i, i / steps) for i in range(n)]


@pytest.mark.parametrize("name", registry.names("litgpt_whittle.samplers"))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_sampler_keeps_the_rules(name, check):
    check(registry.lookup("litgpt_whittle.samplers", name))


def test_samplers_choose_what_they_say():
    assert networks_of(Standard(space()), 3) == [[None]] * 3
    assert all(len(found) == 4 and None not in found for found in networks_of(Uniform(space(), n=4), 5))
    assert [found == [None] for found in networks_of(Alternate(space()), 4)] == [True, False, True, False]
    for sandwich in (Sandwich(space(), n=1), InPlaceDistillation(space(), n=1)):
        for full, smallest, between in networks_of(sandwich, 5):
            assert full is None and smallest == space().smallest() and between is not None
    assert InPlaceDistillation.teaches and not Sandwich.teaches
    fewest = min(space().n_params(space().sample(np.random.default_rng(i))) for i in range(50))
    assert space().sizes.smallest == space().n_params(space().smallest()) <= fewest


def test_random_linear_grows_linearly():
    counts = Counter()
    for i, (network,) in enumerate(networks_of(RandomLinear(space(), start=0.2, end=1.0), 1000)):
        counts[i // 250] += network is not None
    # 0.2 + 0.8 · done, in quarters; four standard deviations
    for quarter, share in enumerate((0.3, 0.5, 0.7, 0.9)):
        assert abs(counts[quarter] / 250 - share) < 4 * (share * (1 - share) / 250) ** 0.5


def test_size_weighted_networks_have_the_inverse_of_their_size_as_weight(monkeypatch):
    small, large = SubNet(FAMILIES["pythia"], n_layer=1), SubNet.full(FAMILIES["pythia"])
    sampler = SizeWeighted(space(), n_drawn=2)
    monkeypatch.setattr(sampler.space, "sample", lambda rng: next(sampler.turn))
    n = 2000
    drawn = []
    for i in range(n):
        sampler.turn = iter([small, large])
        drawn += sampler.networks(np.random.default_rng(i), i, 0.0)
    sizes = space().n_params(small), space().n_params(large)
    share = sizes[1] / sum(sizes)
    assert abs(drawn.count(small) / n - share) < 4 * (share * (1 - share) / n) ** 0.5


# -- the command


def train(out_dir: Path, **kwargs):
    """Run `litgpt pretrain_supernet` in this process."""
    usual = {
        "model_config": config(),
        "out_dir": out_dir,
        "precision": "32-true",
        "data": TokenData(),
        "train": train_args(),
        "eval": EvalArgs(interval=2, max_iters=2),
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
        "devices": 1,
        "logger_name": "csv",
        "supernet": SupernetArgs(search_space=SEARCH_SPACE),
    }
    if "initial_checkpoint_dir" in kwargs:
        del usual["model_config"]
    setup(**(usual | kwargs))
    return load_model(out_dir / "final").state_dict()


@pytest.mark.pictures
def test_it_leaves_a_stock_checkpoint_and_scores_of_sub_networks(tmp_path):
    train(tmp_path / "out", supernet=SupernetArgs(search_space=SEARCH_SPACE, n_validated=2))
    stock = GPT(Config.from_file(tmp_path / "out/final/model_config.yaml"))
    stock.load_state_dict(torch.load(tmp_path / "out/final/lit_model.pth", weights_only=True))
    last = rows(tmp_path / "out", "val_loss")[-1]
    names = [name for name in last if name.startswith("val_loss/")]
    assert len(names) == 3 and names[0].startswith("val_loss/smallest (")
    smallest = Space(config(), "coarse_layerwise", args=SEARCH_SPACE).smallest()
    student = student_model(smallest)
    student.load_state_dict(extract_weights(stock, smallest))
    for name, model in (("val_loss", stock), (names[0], student)):
        data = TokenData()
        data.connect(batch_size=4, max_seq_length=8)
        ids = torch.cat(list(data.val_dataloader()))[:8]
        with torch.no_grad():
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        assert last[name] == pytest.approx(loss.item(), rel=1e-5)
    assert (tmp_path / "out/training.png").stat().st_size > 10_000


def test_the_full_networks_loss_is_a_mean_over_the_steps_that_trained_it(tmp_path):
    settings = {"data": InOrder(n_train=48), "eval": EvalArgs(interval=100, max_iters=1)}
    settings["supernet"] = SupernetArgs(search_space=SEARCH_SPACE, sampler="alternate", n_validated=0)
    for interval in (1, 4):
        train(tmp_path / str(interval), **settings, train=train_args(max_tokens=8 * 64, log_interval=interval))
    single, together = (rows(tmp_path / name) for name in ("1", "4"))
    trained = [[row["full"] for row in single[i : i + 4] if "full" in row] for i in (0, 4)]
    assert [len(losses) for losses in trained] == [2, 2]
    assert [row["full"] for row in together] == pytest.approx([sum(losses) / 2 for losses in trained])


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    args = {"train": train_args(save_interval=2), "supernet": SupernetArgs(search_space=SEARCH_SPACE)}
    expected = train(tmp_path / "whole", **args)
    found = train(tmp_path / "parts", **args, resume=tmp_path / "whole/step-00000002")
    assert same(found, expected)
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0][2:] == losses[1]


def test_it_goes_on_from_a_pretrained_checkpoint(tmp_path):
    start = checkpoint(tmp_path / "start", seed=3)
    train(tmp_path / "out", initial_checkpoint_dir=start, train=replace(train_args(), max_norm=1e-9))
    before, after = (torch.load(tmp_path / name / "lit_model.pth") for name in ("start", "out/final"))
    change = (before["lm_head.weight"] - after["lm_head.weight"]).abs().max()
    assert 0 < change < 0.1


@dataclass
class Masked(TokenData):
    """A data module with labels from the fifth token on."""

    def loader(self, n, seed, shuffle):
        samples = self.samples(n, seed)
        labels = samples.masked_fill(torch.arange(self.length) < 4, -100)
        rows = [{"input_ids": ids, "labels": own} for ids, own in zip(samples, labels)]
        return DataLoader(rows, batch_size=self.batch_size, drop_last=True)


def test_labels_that_are_masked_do_not_count(tmp_path):
    start = checkpoint(tmp_path / "start")
    once = {"train": train_args(max_tokens=None, max_steps=1, micro_batch_size=8), "initial_checkpoint_dir": start}
    train(tmp_path / "out", data=Masked(), **once, supernet=SupernetArgs(sampler="standard", n_validated=0))
    data = Masked()
    data.connect(batch_size=8, max_seq_length=8)
    ids = next(iter(data.train_dataloader()))["input_ids"]
    with torch.no_grad():
        logits = load_model(start)(ids[:, :-1])[:, 3:]
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten())
    assert rows(tmp_path / "out")[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_bad_input_is_one_line(tmp_path):
    def refused(message, **kwargs):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "out", **kwargs)
        assert not (tmp_path / "out").exists()

    refused("there is no 'club' in litgpt_whittle.samplers", supernet=SupernetArgs(sampler="club"))
    refused("sandwich has no setting 'm'; it takes n", supernet=SupernetArgs(sampler={"sandwich": {"m": 3}}))
    refused(r"sampler\.n must be at least 1, got 0", supernet=SupernetArgs(sampler={"random": {"n": 0}}))
    wide = SpaceArgs(smallest=SizeArgs(n_embd=64))
    refused("smallest.n_embd must be at most the teacher's 32, got 64", supernet=SupernetArgs(search_space=wide))
    nobody = SupernetArgs(sampler="in_place_distillation", distill=DistillArgs(beta=0))
    refused("set supernet.distill.beta above 0", supernet=nobody)
    refused("no model is given", model_config=None)
    refused("global_batch_size must be a multiple", train=train_args(global_batch_size=6))
    with pytest.raises(UserError, match="must be same or different, got 'other'"):
        SupernetArgs(per_rank="other")


# -- two processes

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_supernet import *
torch.set_num_threads(1)
train(Path({out!r}), devices=2, {settings})
"""


def two_processes(out: Path, settings: str) -> None:
    """Run `litgpt pretrain_supernet` with two processes; `settings` is source code."""
    script = out.with_suffix(".py")
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(out), settings=settings))
    done = forked.run(script, n=2)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "strategy, sampler",
    [
        ("fsdp", "in_place_distillation"),
        ("fsdp", "random"),
        ("ddp", "in_place_distillation"),
        ("ddp", "random"),
    ],
)
@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path, strategy, sampler):
    supernet = f"SupernetArgs(search_space=SEARCH_SPACE, sampler={sampler!r}, n_validated=0)"
    one = train(tmp_path / "one", supernet=eval(supernet), train=train_args(max_tokens=4 * 64))
    more = f"strategy={strategy!r}, train=train_args(max_tokens=4 * 64, micro_batch_size=2)"
    two_processes(tmp_path / "two", f"supernet={supernet}, {more}")
    two = load_model(tmp_path / "two/final").state_dict()
    assert [row["loss"] for row in rows(tmp_path / "two")] == pytest.approx(
        [row["loss"] for row in rows(tmp_path / "one")], abs=1e-5
    )
    assert torch.allclose(predict(one), predict(two), atol=1e-4)


@dataclass
class InOrder(TokenData):
    """A data module without shuffling."""

    def loader(self, n, seed, shuffle):
        return super().loader(n, seed, False)


def test_processes_need_not_all_train_the_full_network(tmp_path):
    sampler = "{'random_linear': {'start': 0.5, 'end': 0.5}}"
    options = f"search_space=SEARCH_SPACE, sampler={sampler}, per_rank='different', n_validated=0"
    two_processes(tmp_path / "two", f"strategy='ddp', supernet=SupernetArgs({options})")
    assert len(rows(tmp_path / "two")) == 6  # runs to the end, each step once


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_processes_can_train_different_networks(tmp_path, strategy):
    start = checkpoint(tmp_path / "start")
    settings = (
        f"initial_checkpoint_dir=Path({str(start)!r}), data=InOrder(), strategy={strategy!r}, "
        "supernet=SupernetArgs(search_space=SEARCH_SPACE, sampler='random', per_rank='different', n_validated=0), "
        "optimizer={'class_path': 'torch.optim.SGD', 'init_args': {'lr': 0.1}}, "
        "train=train_args(max_tokens=None, max_steps=1, lr_warmup_steps=0, max_norm=None)"
    )
    two_processes(tmp_path / "two", settings)
    # recompute: each process's network on its own batch, then one step with the mean gradient
    model = load_model(start, "SuperGPT")
    data, losses = InOrder(), []
    data.connect(batch_size=4, max_seq_length=8)
    networks = [
        Space(config(), "coarse_layerwise", args=SEARCH_SPACE).sample(np.random.default_rng([42, 0, process]))
        for process in range(2)
    ]
    assert networks[0].layers != networks[1].layers or networks[0] != networks[1]
    for network, ids in zip(networks, data.train_dataloader()):
        step = step_of(model, Given([network]))
        losses.append(float(step(ids[:, :-1], ids[:, 1:], lambda loss: (loss / 2).backward(), 0.0)["loss"]))
    assert rows(tmp_path / "two")[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    found = load_model(tmp_path / "two/final").state_dict()
    for name, weight in model.named_parameters():
        assert torch.allclose(found[name], weight.detach() - 0.1 * weight.grad, atol=1e-6), name
