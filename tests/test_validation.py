"""Test that validation uses the same text at every pass, in every command, also with reshuffled data."""

from dataclasses import dataclass, field

import pytest
import torch
from litgpt.args import EvalArgs
from test_supernet import train as train_supernet
from test_train import SEQ, TokenData, checkpoint, rows, run, same, train_args
from torch.utils.data import DataLoader

from litgpt_whittle.batches import validation_batches
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.errors import UserError
from litgpt_whittle.training import validation
from litgpt_whittle.training.resume import rng_state
from litgpt_whittle.training.validation import ValidationBatches


class ByEpoch:
    """Iterate in a new order at every pass, like litdata's StreamingDataset, which TextFiles uses."""

    def __init__(self, samples, batch_size, passes):
        self.samples, self.batch_size, self.epoch, self.passes = samples, batch_size, 0, passes

    def __iter__(self):
        self.epoch += 1
        self.passes.append(self.epoch)
        order = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(self.epoch))
        yield from self.samples[order].split(self.batch_size)


@dataclass
class Reshuffled(TokenData):
    """A data module that validates on another part of its validation text at every pass."""

    n_val: int = 40
    kind: str = "by epoch"
    passes: list = field(default_factory=list)

    def val_dataloader(self):
        samples = self.samples(self.n_val, 1)
        if self.kind == "by epoch":
            return ByEpoch(samples, self.batch_size, self.passes)
        own = torch.Generator().manual_seed(5) if self.kind == "own generator" else None
        return DataLoader(samples, batch_size=self.batch_size, shuffle=True, generator=own)


KINDS = pytest.mark.parametrize("kind", ["by epoch", "global generator", "own generator"])
EVAL = EvalArgs(interval=2, max_iters=3, initial_validation=True)


@KINDS
def test_teacher_and_student_are_judged_on_the_same_text_at_every_validation(tmp_path, kind):
    """A student that equals the teacher and does not learn has its loss at all times."""
    teacher = checkpoint(tmp_path / "teacher")
    still = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}
    data = Reshuffled(kind=kind)
    models = {"teacher_checkpoint_dir": teacher, "initial_checkpoint_dir": teacher}
    train = train_args(min_lr=0.0)
    run(tmp_path / "out", **models, data=data, eval=EVAL, distill=DistillArgs(), optimizer=still, train=train)
    (expected,) = (row["teacher_val_loss"] for row in rows(tmp_path / "out", "teacher_val_loss"))
    losses = [row["val_loss"] for row in rows(tmp_path / "out", "val_loss")]
    assert len(losses) == 5 and losses == pytest.approx([expected] * 5, abs=1e-6)
    assert len(data.passes) == (kind == "by epoch")


@KINDS
def test_a_resumed_run_validates_on_the_text_of_the_unbroken_one(tmp_path, kind):
    kwargs = {"train": train_args(save_interval=1), "eval": EvalArgs(interval=2, max_iters=3)}
    unbroken = run(tmp_path / "a", data=Reshuffled(kind=kind), **kwargs)
    resumed = run(tmp_path / "b", data=Reshuffled(kind=kind), resume=tmp_path / "a/step-00000003", **kwargs)
    assert same(unbroken, resumed)
    a, b = ([row["val_loss"] for row in rows(tmp_path / name, "val_loss")] for name in "ab")
    assert a[-3:] == b


def test_sub_networks_are_validated_on_the_same_text_as_the_full_network(tmp_path):
    """All sub-networks equal the full one if there is nothing to search."""
    from litgpt_whittle.spaces.args import (
        SizeArgs,
        SpaceArgs,
    )
    from litgpt_whittle.supernet import SupernetArgs

    sizes = SizeArgs(n_layer=2, n_embd=32, n_query_groups=4, intermediate_size=128)
    supernet = SupernetArgs(search_space=SpaceArgs(smallest=sizes), sampler="standard", n_validated=0)
    train_supernet(tmp_path, data=Reshuffled(), eval=EVAL, supernet=supernet)
    for row in rows(tmp_path, "val_loss"):
        (smallest,) = (value for name, value in row.items() if name.startswith("val_loss/"))
        assert smallest == pytest.approx(row["val_loss"], abs=1e-6)


def all_batches(batches):
    return [batch.tolist() for batch, _ in batches]


@KINDS
def test_a_validation_too_long_to_be_kept_is_read_again_in_the_same_order(monkeypatch, kind):
    data = Reshuffled(kind=kind)
    data.connect(batch_size=4, max_seq_length=SEQ)

    def batches():
        return ValidationBatches(data.val_dataloader(), data.val_dataloader, 5)

    kept = batches()
    expected = all_batches(kept)
    assert all_batches(kept) == expected and len(expected) == 5
    monkeypatch.setattr(validation, "KEPT_BYTES", 4 * (SEQ + 1) * 8 * 3)
    read_again = batches()
    torch.manual_seed(3)
    before = rng_state()["torch"]
    assert all_batches(read_again) == all_batches(read_again) == expected
    assert torch.equal(rng_state()["torch"], before)
    assert read_again._kept is None


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(world_size):
    data = Reshuffled()
    data.connect(batch_size=4, max_seq_length=SEQ)
    make = data.val_dataloader
    expected = all_batches(ValidationBatches(make(), make, 7))
    shares = [list(ValidationBatches(make(), make, 7, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    turns = [batch.tolist() for turn in zip(*shares) for batch, counts in turn if counts]
    assert turns == expected


def test_random_numbers_stay_in_step_with_a_pass_over_the_dataloader():
    """`litgpt pretrain` makes such a pass at every validation, and draws the order of the training data after it."""
    data = Reshuffled(kind="global generator")
    data.connect(batch_size=4, max_seq_length=SEQ)
    torch.manual_seed(3)
    list(data.val_dataloader())
    expected = torch.rand(3)
    torch.manual_seed(3)
    batches = ValidationBatches(data.val_dataloader(), data.val_dataloader, 5)
    list(batches)
    batches.draw()
    assert torch.equal(torch.rand(3), expected)


@KINDS
def test_a_search_scores_on_the_text_that_training_validates_on(kind):
    data = Reshuffled(kind=kind)
    data.connect(batch_size=4, max_seq_length=SEQ)
    in_training = [batch for batch, _ in ValidationBatches(data.val_dataloader(), data.val_dataloader, 5)]
    for seed in (1, 2):
        torch.manual_seed(seed)
        in_search = validation_batches(data, SEQ, 5)
        assert all(torch.equal(a.input_ids, b[:, :-1]) for a, b in zip(in_search, in_training, strict=True))


@dataclass
class AllMasked(TokenData):
    """Prompts that fill the samples, so that all labels of the validation data are masked."""

    def val_dataloader(self):
        rows = [{"input_ids": ids, "labels": torch.full_like(ids, -100)} for ids in self.samples(self.n_val, 1)]
        return DataLoader(rows, batch_size=self.batch_size)


@pytest.mark.parametrize("train", [run, train_supernet])
def test_validation_labels_that_are_all_masked_are_refused_in_one_line(tmp_path, train):
    message = "labels that count, and all those of the first 2 batches are masked; raise train.max_seq_length"
    with pytest.raises(UserError, match=message) as refused:
        train(tmp_path / "out", data=AllMasked())
    assert "\n" not in str(refused.value) and not (tmp_path / "out/metrics.jsonl").read_text()
    data = AllMasked()
    data.connect(batch_size=4, max_seq_length=SEQ)
    with pytest.raises(UserError, match="holds no token to predict"):
        validation_batches(data, SEQ, 5)
