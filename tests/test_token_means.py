"""Test that a step's gradient is the mean over its unmasked tokens, for any split into micro-batches and processes."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from litgpt.args import EvalArgs
from test_distill_devices import Code
from test_distill_devices import two_processes as distill_by_two
from test_supernet import train as train_supernet
from test_supernet import two_processes as supernet_by_two
from test_train import VOCAB, TokenData, checkpoint, config, rows, run, same, train_args
from torch.utils.data import DataLoader

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.distillation.args import (
    DistillArgs,
    HiddenArgs,
)
from litgpt_whittle.distillation.hidden import HiddenLoss
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import student_model
from litgpt_whittle.supernet import SupernetArgs


@dataclass
class Uneven(TokenData):
    """A data module with none to all of a sample's labels unmasked, as in instructions of different lengths."""

    def loader(self, n, seed, shuffle):
        samples = self.samples(n, seed)
        n_masked = torch.tensor([0, 9, 5, 2, 8, 7, 1, 4]).repeat(-(-n // 8))[:n, None]
        labels = samples.masked_fill(torch.arange(self.length) < n_masked, -100)
        rows = [{"input_ids": ids, "labels": own} for ids, own in zip(samples, labels)]
        return DataLoader(rows, batch_size=self.batch_size, shuffle=shuffle, drop_last=True)

    def all(self):
        self.connect(batch_size=8, max_seq_length=8)
        batch = next(iter(self.loader(8, 0, False)))
        return batch["input_ids"][:, :-1], batch["labels"][:, 1:]


RATE = 0.5  # unchanged, because litgpt's schedule counts micro-batches
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": RATE}}
ONCE = "train_args(max_tokens=None, max_steps=1, lr_warmup_steps=0, max_norm=None, min_lr=0.5, micro_batch_size={})"
COMMON = {"eval": EvalArgs(interval=100, max_iters=1), "optimizer": SGD, "data": Uneven(n_train=8)}
CODE = {
    "eval": Code("EvalArgs(interval=100, max_iters=1)"),
    "optimizer": SGD,
    "data": Code("__import__('test_token_means').Uneven(n_train=8)"),
}
SUPERNET = "SupernetArgs(sampler='random', n_validated=0)"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return checkpoint(folder / "student"), checkpoint(folder / "teacher", n_embd=48, seed=1)


def stepped(student_dir, teacher_dir):
    """Return the loss of the paper's formula on all unmasked tokens at once, and the weights after one step."""
    student, teacher = load_model(student_dir), load_model(teacher_dir)
    ids, targets = Uneven().all()
    counts = targets != -100
    z, t = student(ids)[counts], teacher(ids)[counts].detach()
    kl = F.kl_div(F.log_softmax(z / 0.9, -1), F.log_softmax(t / 0.9, -1), log_target=True, reduction="batchmean")
    loss = 0.2 * F.cross_entropy(z, targets[counts]) + 0.8 * 0.9**2 * kl
    loss.backward()
    return loss.item(), {name: w.detach() - RATE * w.grad for name, w in student.named_parameters()}


def assert_stepped(out, loss, weights):
    assert rows(out)[0]["loss"] == pytest.approx(loss, abs=1e-6)
    found = load_model(out / "final").state_dict()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(found[name], weight, atol=1e-6, rtol=0), name


@pytest.mark.parametrize("micro_batch_size", [8, 2, 1])
def test_a_distillation_step_is_that_of_the_formula_for_any_split(tmp_path, models, micro_batch_size):
    student, teacher = models
    expected = stepped(student, teacher)
    given = {"initial_checkpoint_dir": student, "teacher_checkpoint_dir": teacher, "distill": DistillArgs()}
    run(tmp_path, train=eval(ONCE.format(micro_batch_size)), **given, **COMMON)
    assert_stepped(tmp_path, *expected)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_take_the_same_distillation_step(tmp_path, models, strategy):
    student, teacher = models
    given = {"initial_checkpoint_dir": student, "teacher_checkpoint_dir": teacher, "strategy": strategy}
    settings = {"model_config": None, "distill": Code("DistillArgs()"), "train": Code(ONCE.format(2))}
    code, printed = distill_by_two(tmp_path / "two", **CODE, **given, **settings)
    assert code == 0, printed
    assert_stepped(tmp_path / "two", *stepped(student, teacher))


def step_of_super_network(out, models, micro_batch_size):
    given = {"initial_checkpoint_dir": models[0], "supernet": SupernetArgs(sampler="random", n_validated=0)}
    train_supernet(out, train=eval(ONCE.format(micro_batch_size)), **given, **COMMON)
    return rows(out)[0]["loss"], load_model(out / "final").state_dict()


def test_a_super_networks_step_is_the_same_for_any_split(tmp_path, models):
    expected = step_of_super_network(tmp_path / "whole", models, 8)
    step_of_super_network(tmp_path / "split", models, 1)
    assert_stepped(tmp_path / "split", *expected)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_take_the_same_step_of_a_super_network(tmp_path, models, strategy):
    code = ", ".join(f"{name}={value!r}" for name, value in CODE.items())
    code += f", initial_checkpoint_dir=Path({str(models[0])!r}), supernet={SUPERNET}, strategy={strategy!r}"
    supernet_by_two(tmp_path / "two", f"{code}, train={ONCE.format(1)}")
    assert_stepped(tmp_path / "two", *step_of_super_network(tmp_path / "one", models, 8))


def test_logged_losses_are_means_over_tokens(tmp_path, models):
    """Against the losses of single micro-batches, some of them without unmasked labels."""
    once = eval(ONCE.format(1))
    given = {"initial_checkpoint_dir": models[0], "data": COMMON["data"], "eval": COMMON["eval"]}
    run(tmp_path, train=once, optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}, **given)
    ids, targets = Uneven().all()
    expected = F.cross_entropy(load_model(models[0])(ids).flatten(0, 1), targets.flatten())
    assert rows(tmp_path)[0]["loss"] == pytest.approx(expected.item(), abs=1e-6)


def test_a_run_with_uneven_labels_resumes_bit_for_bit(tmp_path, models):
    kwargs = {"data": Uneven(n_train=20), "teacher_checkpoint_dir": models[1], "distill": DistillArgs()}
    kwargs["train"] = train_args(save_interval=1, micro_batch_size=2)
    unbroken = run(tmp_path / "a", **kwargs)
    assert same(unbroken, run(tmp_path / "b", resume=tmp_path / "a/step-00000003", **kwargs))
    a, b = ([row["loss"] for row in rows(tmp_path / name)] for name in "ab")
    assert a[3:] == b


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_streams_are_matched_where_labels_count(loss):
    """Masked tokens, such as padding, do not change the loss; a mask that hides nothing changes nothing.

    Nor does the split into micro-batches, or a token whose stream is a thousand times larger than the others'.
    """
    teacher = config(n_embd=48)
    torch.manual_seed(0)
    student, args = student_model(SubNet(teacher, n_embd=32)), HiddenArgs(weight=1.0, loss=loss)
    hidden = HiddenLoss(student, teacher, args, SubNet(teacher, n_embd=32))
    hidden.watch.is_on = True
    ids = torch.randint(VOCAB, (2, 8))
    streams = {place: torch.randn(2, 8, 48) for place in hidden.pairs.values()}

    def found(rows, counts):
        student(ids[:, rows])
        return hidden({place: stream[:, rows] for place, stream in streams.items()}, counts)

    for stream in streams.values():
        stream[0, 0] *= 1000
    both = found(slice(None), None)
    parts = []
    for i in range(2):
        student(ids[i : i + 1])
        parts.append(hidden({place: stream[i : i + 1] for place, stream in streams.items()}))
    assert torch.allclose(torch.stack(parts).mean(), both)
    counts = torch.arange(8).expand(2, 8) < 5
    assert torch.allclose(found(slice(None), counts), found(slice(5), None))
    assert torch.equal(found(slice(None), counts | True), found(slice(None), None))
    nothing = found(slice(None), counts & False)
    nothing.backward()
    assert nothing == 0 and all(not weight.grad.any() for weight in student.transformer.h[0].parameters())
