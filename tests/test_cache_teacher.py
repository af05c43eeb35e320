"""Test `litgpt cache_teacher`, and `litgpt distill --teacher_cache` with its output."""

import json
import shutil
import weakref
from dataclasses import dataclass

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from litgpt import GPT
from litgpt.tokenizer import Tokenizer
from litgpt.utils import CLI
from test_distill import tokenizer as word_tokenizer
from test_train import SEQ, VOCAB, TokenData, checkpoint, config, interrupted, rows, run, same, train_args
from texts import documents, write_jsonl, write_tokenizer
from torch.utils.data import DataLoader, IterableDataset

import litgpt_whittle.commands.distill as distill_command
from litgpt_whittle import files
from litgpt_whittle.checkpoint import check_checkpoint, load_model
from litgpt_whittle.commands import cache_teacher as command
from litgpt_whittle.commands.cache_teacher import WindowArgs, setup
from litgpt_whittle.data import HFText
from litgpt_whittle.data.loading import split_batch
from litgpt_whittle.distillation.args import (
    DistillArgs,
    RampArgs,
)
from litgpt_whittle.distillation.cache import Cache, Index, shard_path
from litgpt_whittle.distillation.head import LossModel
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.errors import UserError
from litgpt_whittle.metrics_log import read_metrics
from litgpt_whittle.training import caching
from litgpt_whittle.training.caching import (
    unique_windows,
    whole_pass,
)
from litgpt_whittle.training.data_stream import DataStream
from litgpt_whittle.training.teacher import (
    CachedTeacher,
    LiveTeacher,
)

CPU = torch.device("cpu")
SAMPLED, TOP_K = {"sampled": {"draws": 12}}, {"top_k": {"k": 8}}


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("teachers") / "teacher", seed=1, n_embd=48)


def cache(teacher_dir, out_dir, **kwargs):
    """Run `litgpt cache_teacher` in this process: 20 windows, two batches of 4 per shard."""
    defaults = {"data": TokenData(n_train=20), "out_dir": out_dir, "codec": "full", "precision": "32-true"}
    n_bytes = 2 * 4 * (16 + SEQ + 4 * SEQ * VOCAB)
    setup(teacher_dir, **(defaults | {"train": WindowArgs(4), "shard_size": str(n_bytes)} | kwargs))
    return out_dir


@pytest.fixture(scope="module")
def full(teacher_dir, tmp_path_factory):
    return cache(teacher_dir, tmp_path_factory.mktemp("full") / "cache")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Make a teacher with a tokenizer, and text for it."""
    folder = tmp_path_factory.mktemp("corpus")
    teacher = checkpoint(folder / "teacher", seed=2, padded_vocab_size=300, vocab_size=300)
    write_tokenizer(teacher)
    return teacher, write_jsonl(folder / "corpus.jsonl", documents(41))


def contents_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def opened(corpus, batch_size, **options):
    teacher, path = corpus
    data = HFText(str(path), **options)
    data.connect(Tokenizer(teacher), batch_size=batch_size, max_seq_length=SEQ)
    data.prepare_data()
    data.setup()
    return data


# -- cached predictions


def test_all_windows_are_cached_with_what_litgpts_model_says_of_them(corpus, tmp_path):
    """Although the loader shuffles and drops the last batch. The oracle is stock litgpt, window by window."""
    teacher, path = corpus
    dataset = opened(corpus, 1).train_dataset
    assert len(dataset) % 4, "there is a last batch to drop"
    store = Cache(cache(teacher, tmp_path / "cache", data=HFText(str(path))))
    model = GPT(check_checkpoint(teacher))
    model.load_state_dict(torch.load(teacher / "lit_model.pth"))
    assert store.n_windows == len({tuple(window[:-1].tolist()) for window in dataset})
    for window in dataset:
        got = store.targets(window[None, :-1])
        with torch.no_grad():
            assert torch.allclose(got, model(window[None, :-1])[0], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_any_batch_of_any_epoch_gets_its_own_targets(corpus, tmp_path, batch_size):
    """In shuffled orders of HFText and PyTorch; the oracle runs the teacher on the same batches."""
    teacher, path = corpus
    store = Cache(cache(teacher, tmp_path / "cache", data=HFText(str(path), seed=5)))
    live, cached = LiveTeacher(teacher, SEQ, torch.float32, CPU), CachedTeacher(store, CPU)
    data = opened(corpus, batch_size, seed=7)
    anew = DataLoader(data.train_dataset, batch_size=batch_size, shuffle=True)
    for loader in (data.train_dataloader(), anew):
        stream = DataStream(loader)
        while stream.epoch < 2:
            input_ids, _ = split_batch(next(stream), SEQ)
            n = input_ids.numel()
            assert torch.allclose(cached(input_ids).chunk(0, n), live(input_ids).chunk(0, n), atol=1e-5)


def test_repeated_windows_are_stored_once(teacher_dir, tmp_path, capsys):
    class Repeating(TokenData):
        def samples(self, n, seed):
            return super().samples(n // 4, seed).repeat(4, 1)

    assert Cache(cache(teacher_dir, tmp_path / "cache", data=Repeating(n_train=40))).n_windows == 10
    assert "80 tokens in 10 different windows of 8" in capsys.readouterr().out


def test_the_bytes_per_token_are_told(teacher_dir, tmp_path, capsys):
    folder = cache(teacher_dir, tmp_path / "cache", codec=SAMPLED)
    n_bytes = sum(path.stat().st_size for path in folder.glob("shard-*"))
    assert n_bytes == 20 * (16 + SEQ * (1 + 12))  # ids of one byte each
    out = capsys.readouterr().out
    assert f"  {n_bytes / 160:.2f} bytes per token, 0.0 MB in 1 shards" in out
    assert f"litgpt distill --teacher_cache {folder} --distill.temperature 0.9" in out


def test_samples_depend_on_the_seed_and_the_window_alone(teacher_dir, tmp_path):
    """The samples do not depend on the batch size, nor on the other data."""
    batch = TokenData()
    batch.connect(max_seq_length=SEQ)
    ids = batch.samples(8, 0)[:, :-1]
    stored = [
        Cache(cache(teacher_dir, tmp_path / str(i), codec=SAMPLED, **kwargs)).targets(ids)
        for i, kwargs in enumerate(
            [
                {"data": TokenData(n_train=8)},
                {"data": TokenData(n_train=8), "train": WindowArgs(3)},
                {"data": Reversed(n_train=8)},
                {"data": TokenData(n_train=8), "seed": 43},
            ]
        )
    ]
    assert torch.equal(stored[0], stored[1]) and torch.equal(stored[0], stored[2])
    assert not torch.equal(stored[0], stored[3])


class Reversed(TokenData):
    def samples(self, n, seed):
        return torch.cat((super().samples(n, seed).flip(0), super().samples(n, seed + 5)))


class ActivationFile(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        yield from self.samples


class Streamed(TokenData):
    """A data module that reads as if streamed from elsewhere."""

    def loader(self, n, seed, shuffle):
        return DataLoader(ActivationFile(self.samples(n, seed)), batch_size=self.batch_size)


def test_a_stream_is_read_as_it_comes(teacher_dir, tmp_path, monkeypatch, full):
    streamed = cache(teacher_dir, tmp_path / "cache", data=Streamed(n_train=20))
    assert shard_path(streamed, 0).read_bytes() == shard_path(full, 0).read_bytes()
    monkeypatch.setattr(command, "world_size", lambda: 2)
    with pytest.raises(UserError, match="Streamed is a stream, which several devices cannot share, got 2"):
        cache(teacher_dir, tmp_path / "two", data=Streamed(n_train=20))


def test_a_pass_is_over_all_of_the_data_in_the_order_of_the_first_epoch():
    loader = DataLoader(torch.arange(10), batch_size=4, shuffle=True, drop_last=True)
    assert (
        torch.cat(list(whole_pass(loader).batches)).tolist() == list(range(10)) and whole_pass(loader).n_windows == 10
    )
    loaders = CombinedLoader([loader])
    assert whole_pass(loaders).batches is loaders and whole_pass(loaders).n_windows is None


def test_of_data_with_a_fixed_order_the_first_tokens_can_be_cached(corpus, tmp_path):
    teacher, path = corpus
    data, n = HFText(str(path), seed=3), 5 * SEQ - 3
    store = Cache(cache(teacher, tmp_path / "cache", data=data, max_tokens=n, train=WindowArgs(2)))
    stream = DataStream(opened(corpus, 1, seed=3).train_dataloader())
    first = torch.cat([split_batch(next(stream), SEQ)[0] for _ in range(6)])
    assert store.targets(first[:5]).shape == (5 * SEQ, 300)
    with pytest.raises(UserError, match="lacks a window"):
        store.targets(first[5:])


def test_windows_must_be_equally_long():
    batches = [torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long)]
    with pytest.raises(UserError, match="equally long to be cached, got 8 and 7 tokens; use data that is packed"):
        list(unique_windows(batches, 8))


# -- training from a cache


def gradients(teacher, ids, objective):
    torch.manual_seed(3)
    student = LossModel(GPT(config()))
    student.objective = objective
    losses = student(ids[:, :-1], ids[:, 1:], teacher(ids[:, :-1]))
    losses.loss.backward()
    return losses, {name: parameter.grad for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("codec", ["full", {"top_k": {"k": VOCAB}}])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_cached_teacher_gives_the_gradients_of_the_live_one(teacher_dir, tmp_path, codec, precision):
    """With all logits stored, and with the most likely tokens if these are all tokens."""
    store = Cache(cache(teacher_dir, tmp_path / "cache", codec=codec, precision=precision))
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    live, cached = LiveTeacher(teacher_dir, SEQ, dtype, CPU), CachedTeacher(store, CPU)
    data = TokenData()
    data.connect(max_seq_length=SEQ)
    ids = data.samples(20, 0)[:4]  # a batch as large as the cache's, so that bf16 rounds the same
    objective = Objective(0.2, 0.8, 0.9)
    (expected, expected_grads), (got, grads) = (gradients(teacher, ids, objective) for teacher in (live, cached))
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if codec == "full" else {"atol": 1e-5, "rtol": 1e-2}
    assert torch.allclose(got.distill, expected.distill, **tolerance)
    for name, grad in grads.items():
        assert torch.allclose(grad, expected_grads[name], **tolerance), name


def test_a_student_of_the_cache_is_a_student_of_the_teacher(teacher_dir, full, tmp_path, monkeypatch):
    """Over epochs of other batches than the cached ones, and without a teacher in memory."""
    train = {"train": train_args(global_batch_size=6, micro_batch_size=3, max_tokens=30 * 6 * SEQ)}
    common = {"data": TokenData(n_train=20), "distill": DistillArgs(temperature=2.0), **train}
    run(tmp_path / "live", teacher_checkpoint_dir=teacher_dir, **common)
    monkeypatch.setattr(distill_command, "LiveTeacher", None)
    run(tmp_path / "cached", teacher_cache=full, **common)
    for key in ("loss", "distill", "val_loss"):
        expected = [row[key] for row in rows(tmp_path / "live", key)]
        assert [row[key] for row in rows(tmp_path / "cached", key)] == pytest.approx(expected, abs=1e-4)
    assert rows(tmp_path / "cached")[-1]["epoch"] > 5
    assert not [row for row in read_metrics(tmp_path / "cached" / "metrics.jsonl") if "teacher_val_loss" in row]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a teacher."""
    folder, train = tmp_path_factory.mktemp("trained"), train_args(max_tokens=60 * 8 * SEQ, global_batch_size=4)
    run(folder, model_config=config(n_embd=48, n_layer=3), train=train)
    return folder / "final"


def test_a_student_learns_from_little(trained, tmp_path):
    """12 samples or 8 tokens, in one epoch, teach nearly as well as the full predictions."""
    data = TokenData(n_train=480)
    kwargs = {"data": data, "distill": DistillArgs(alpha=0, beta=1), "train": train_args(max_tokens=480 * SEQ)}
    run(tmp_path / "live", teacher_checkpoint_dir=trained, **kwargs)
    ids = data.samples(100, 1)[:, :-1]
    p = torch.softmax(LiveTeacher(trained, SEQ, torch.float32, CPU)(ids).chunk(0, ids.numel()) / 0.9, -1)

    def kl(model: GPT) -> float:
        log_q = torch.log_softmax(model(ids).flatten(0, 1) / 0.9, -1)
        return (p * (p.log() - log_q)).sum(-1).mean().item()

    untrained, live = kl(GPT(config())), kl(load_model(tmp_path / "live" / "final"))
    assert live < 0.5 * untrained
    for name, codec in {"sampled": SAMPLED, "top_k": TOP_K}.items():
        run(tmp_path / name, teacher_cache=cache(trained, tmp_path / f"{name}-cache", data=data, codec=codec), **kwargs)
        assert kl(load_model(tmp_path / name / "final")) - live < 0.2 * (untrained - live), name


@pytest.mark.parametrize("at_step", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_like_an_unbroken_one(teacher_dir, tmp_path, monkeypatch, at_step):
    store = cache(teacher_dir, tmp_path / "cache", codec=SAMPLED)
    kwargs = {
        "train": train_args(save_interval=1, max_tokens=5 * 8 * SEQ),
        "data": TokenData(n_train=20),
        "teacher_cache": store,
        "distill": DistillArgs(),
    }
    unbroken = run(tmp_path / "unbroken", **kwargs)
    assert same(unbroken, interrupted(tmp_path, monkeypatch, at_step, **kwargs))
    assert [row["loss"] for row in rows(tmp_path / "broken")] == [row["loss"] for row in rows(tmp_path / "unbroken")]


def test_resuming_with_another_cache_is_refused(teacher_dir, full, tmp_path):
    kwargs = {"data": TokenData(n_train=20), "distill": DistillArgs(), "train": train_args(max_steps=1)}
    run(tmp_path / "out", teacher_cache=full, **kwargs)
    other = cache(teacher_dir, tmp_path / "cache", codec={"top_k": {"k": VOCAB}})
    with pytest.raises(UserError, match="teacher_cache's index was"):
        run(tmp_path / "out", teacher_cache=other, resume=True, **kwargs)


def test_where_the_teacher_is_given_too_it_is_validated_and_then_forgotten(teacher_dir, full, tmp_path, monkeypatch):
    teachers, look_up = [], CachedTeacher.__call__
    load = distill_command.LiveTeacher

    def watched(*args):
        live = load(*args)
        teachers.append(weakref.ref(live))
        return live

    def without_teacher(self, input_ids):
        assert teachers and teachers[0]() is None, "the teacher is still in memory"
        return look_up(self, input_ids)

    monkeypatch.setattr(distill_command, "LiveTeacher", watched)
    monkeypatch.setattr(CachedTeacher, "__call__", without_teacher)
    both = {"teacher_checkpoint_dir": teacher_dir, "teacher_cache": full, "distill": DistillArgs()}
    run(tmp_path / "out", data=TokenData(n_train=20), **both)
    assert "teacher_val_loss" in read_metrics(tmp_path / "out" / "metrics.jsonl")[0]


def test_targets_are_looked_up_before_a_batch_is_sent_to_the_device(full, tmp_path, monkeypatch):
    """Reading a batch back from a GPU would wait for all of its work, once per micro-batch."""
    events, targets, send = [], Cache.targets, L.Fabric.to_device

    def looked_up(self, input_ids):
        events.append("look up")
        return targets(self, input_ids)

    def sent(self, batch):
        events.append("send")
        return send(self, batch)

    monkeypatch.setattr(Cache, "targets", looked_up)
    monkeypatch.setattr(L.Fabric, "to_device", sent)
    run(tmp_path, teacher_cache=full, distill=DistillArgs(), data=TokenData(n_train=20, n_val=8), train=train_args())
    is_training = [i for i, event in enumerate(events) if event == "look up"]
    assert len(is_training) == 12 and all(events[i + 1] == "send" for i in is_training)  # 6 steps of 2 micro-batches


def test_a_cache_alone_brings_the_tokenizer(corpus, tmp_path):
    teacher, path = corpus
    store = cache(teacher, tmp_path / "cache", data=HFText(str(path)))
    sizes = {"padded_vocab_size": 300, "vocab_size": 300}
    data = HFText(str(path))
    run(tmp_path / "out", model_config=config(**sizes), data=data, teacher_cache=store, distill=DistillArgs())
    assert (tmp_path / "out/final/tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()


# -- rejected input


def refuse(folder, match, **kwargs):
    with pytest.raises(UserError, match=match) as refused:
        run(folder / "out", **({"data": TokenData(n_train=20), "distill": DistillArgs()} | kwargs))
    assert "\n" not in str(refused.value) and not list(folder.glob("out/*-*"))


@pytest.mark.parametrize(
    "codec, distill, match",
    [
        (
            SAMPLED,
            {"loss": "mse"},
            "mse needs all logits, got only samples from the cache .*; choose a loss",
        ),
        (TOP_K, {"loss": {"forward_kl": 1, "l1": 0.1}}, "l1 needs all logits, got only distributions from the cache"),
        (SAMPLED, {"loss": "reverse_kl"}, "reverse_kl is biased on the samples of the cache .*; choose forward_kl"),
        (SAMPLED, {"loss": {"jensen_shannon": {"beta": 0.2}}}, "jensen_shannon is biased"),
        (
            SAMPLED,
            {"temperature": 2.0},
            "must be 0.9, the temperature of the cache .*, got 2.0; set --distill.temp",
        ),
        (
            TOP_K,
            {"temperature": RampArgs(0.9, 1.0)},
            r"the temperature of the cache .* got RampArgs\(start=0.9",
        ),
    ],
)
def test_a_loss_that_the_cache_has_too_little_for_is_refused(teacher_dir, tmp_path, codec, distill, match):
    store = cache(teacher_dir, tmp_path / "cache", codec=codec)
    refuse(tmp_path, match, teacher_cache=store, distill=DistillArgs(**distill))


def test_losses_that_it_has_enough_for_are_not(teacher_dir, tmp_path):
    step = {"data": TokenData(n_train=20), "train": train_args(max_steps=1)}
    store = cache(teacher_dir, tmp_path / "top_k", codec=TOP_K)
    for i, loss in enumerate(["reverse_kl", {"jensen_shannon": {"beta": 0.2}, "mse": 0}]):
        run(tmp_path / f"a{i}", teacher_cache=store, distill=DistillArgs(loss=loss), **step)
    store = cache(teacher_dir, tmp_path / "sampled", codec=SAMPLED)
    run(tmp_path / "b", teacher_cache=store, distill=DistillArgs(loss="soft_cross_entropy"), **step)


def test_a_cache_that_ends_before_the_training_is_refused(corpus, tmp_path):
    teacher, path = corpus
    told = {"data": HFText(str(path), seed=3), "train": WindowArgs(4)}
    store = cache(teacher, tmp_path / "cut", max_tokens=16 * SEQ, **told)
    batch = 8 * SEQ
    student = {"data": HFText(str(path), seed=3), "model_config": config(padded_vocab_size=300, vocab_size=300)}
    refuse(
        tmp_path, f"must have the {3 * batch} tokens of the training, got {2 * batch}; lower train.max_tokens, "
        f"or cache the teacher with --max_tokens {3 * batch}",
        teacher_cache=store, train=train_args(max_steps=3), **student,
    )  # fmt: skip
    run(tmp_path / "a", teacher_cache=store, distill=DistillArgs(), train=train_args(max_steps=2), **student)
    # a cache of all the data serves any number of epochs, whatever `max_tokens` was
    whole = cache(teacher, tmp_path / "whole", max_tokens=10**6, **told)
    n = Cache(whole).n_windows * SEQ // batch
    run(tmp_path / "b", teacher_cache=whole, distill=DistillArgs(), train=train_args(max_steps=n + 2), **student)


def test_all_losses_learn_from_all_logits(full, tmp_path):
    loss = {"mse": 0.1, "reverse_kl": 1}
    ramp = DistillArgs(loss=loss, temperature=RampArgs(2.0, 1.0))
    run(tmp_path, teacher_cache=full, distill=ramp, data=TokenData(n_train=20), train=train_args(max_steps=1))


def test_a_window_that_is_not_there_ends_the_training(full, tmp_path):
    with pytest.raises(UserError, match="lacks a window .* other data, another train.max_seq_length, another tokenize"):
        run(tmp_path, teacher_cache=full, distill=DistillArgs(), data=TokenData(n_train=24))


def test_another_length_vocabulary_tokenizer_or_teacher_is_refused(teacher_dir, full, tmp_path):
    refuse(tmp_path, "must be 8, as for the cache .* got 4; set --train.max_seq_length 8", teacher_cache=full,
           train=train_args(max_seq_length=4))  # fmt: skip
    match = "same number of vocabulary entries, .* got 100 and 128 entries, and .* has no tokenizer"
    refuse(tmp_path, match, teacher_cache=full, model_config=config(padded_vocab_size=128))
    other = checkpoint(tmp_path / "other", seed=9, n_embd=48)
    match = "must be the teacher of the cache .*, tiny, got .* with other weights; leave it out"
    refuse(tmp_path, match, teacher_cache=full, teacher_checkpoint_dir=other)
    words = word_tokenizer(checkpoint(tmp_path / "words"))
    swapped = word_tokenizer(checkpoint(tmp_path / "swapped"), swapped=True)
    store = cache(words, tmp_path / "cache")
    refuse(tmp_path, "same tokenizer", teacher_cache=store, initial_checkpoint_dir=swapped)


def test_a_damaged_cache_is_refused_before_training(teacher_dir, tmp_path):
    store = cache(teacher_dir, tmp_path / "cache")
    content = bytearray(shard_path(store, 1).read_bytes())
    content[-5] ^= 16
    shard_path(store, 1).write_bytes(content)
    refuse(tmp_path, "shard-00001.bin' is damaged", teacher_cache=store)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"data": None}, "data must be chosen"),
        ({"codec": "none"}, "there is no 'none' in litgpt_whittle.codecs"),
        ({"codec": {"top_k": {"k": 101}}}, "k must be between 1 and the vocabulary's 100 tokens, got 101"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ({"shard_size": "many"}, "an amount in bytes looks like"),
        ({"train": WindowArgs(4, SEQ + 1)}, "at most the teacher's block_size 8, got 9"),
        ({"devices": 4096}, "devices must be at most"),
        ({"teacher_placement": "sharded"}, "teacher_placement sharded needs several devices, got 1"),
        ({"resume": True}, "there is nothing to resume"),
        (
            {"max_tokens": 16},
            "max_tokens needs data whose order depends on its seed alone, such as HFText, got max_tokens 16",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_written(teacher_dir, tmp_path, kwargs, match):
    with pytest.raises(UserError, match=match) as refused:
        cache(teacher_dir, tmp_path / "cache", **kwargs)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_refused(teacher_dir, full, tmp_path):
    with pytest.raises(UserError, match="holds a cache already; continue it with --resume true"):
        cache(teacher_dir, full)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="out_dir must be empty or new"):
        cache(teacher_dir, tmp_path)


def test_a_disk_that_is_too_small_is_told_before_caching(teacher_dir, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=64_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="the cache takes 0.1 MB and .* has 0.1 MB left; free some space"):
        cache(teacher_dir, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    teacher = checkpoint(tmp_path / "teacher")
    weights = torch.load(teacher / "lit_model.pth")
    weights["lm_head.weight"][3] = torch.inf
    torch.save(weights, teacher / "lit_model.pth")
    with pytest.raises(
        UserError, match="logits must be finite, and are not in this precision; use --precision bf16-true"
    ):
        cache(teacher, tmp_path / "cache")


# -- resuming


def test_a_removed_shard_is_written_anew(teacher_dir, full, tmp_path):
    expected = contents_of(full)
    store = shutil.copytree(full, tmp_path / "cache")
    shard_path(store, 1).unlink()
    assert contents_of(cache(teacher_dir, store, resume=True)) == expected
    assert contents_of(cache(teacher_dir, store, resume=True)) == expected  # nothing is left to do


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"codec": SAMPLED}, "codec.sampled.draws was None and is 12, .* codec.full was {} and is None"),
        ({"seed": 1}, "must keep its settings: seed was 42 and is 1; change back"),
        ({"train": WindowArgs(2)}, "micro_batch_size was 4 and is 2"),
        ({"data": TokenData(n_train=24)}, "data.init_args.n_train was 20 and is 24"),
    ],
)
def test_resuming_with_other_settings_is_refused(teacher_dir, full, changed, match):
    with pytest.raises(UserError, match=match):
        cache(teacher_dir, full, resume=True, **changed)


def test_resuming_with_data_that_changed_is_refused(teacher_dir, full, tmp_path, monkeypatch):
    """Even with the same settings."""
    store, samples = shutil.copytree(full, tmp_path / "cache"), TokenData.samples
    monkeypatch.setattr(TokenData, "samples", lambda self, n, seed: samples(self, n, seed + 1))
    with pytest.raises(UserError, match="shard-00000.bin' differs from the training data: the data changed"):
        cache(teacher_dir, store, resume=True)
    monkeypatch.setattr(TokenData, "samples", lambda self, n, seed: samples(self, n, seed)[:16])
    with pytest.raises(UserError, match="fills 2 shards, the cache .* has 3: the data changed"):
        cache(teacher_dir, store, resume=True)


# -- the command line


@dataclass
class CommandData(TokenData):
    n_train: int = 20


def test_the_command_line(teacher_dir, tmp_path):
    flags = [str(teacher_dir), "--data=test_cache_teacher.CommandData", f"--out_dir={tmp_path / 'cache'}"]
    CLI(setup, args=[*flags, "--codec={top_k: {k: 8}}", "--train.micro_batch_size=2", "--shard_size=1KB"])
    contents = Index.read(tmp_path / "cache").contents
    assert contents.codec == TOP_K and contents.micro_batch_size == 2 and contents.shard_bytes == 1000
    assert json.loads((tmp_path / "cache/index.json").read_text())["contents"]["data"]["init_args.n_train"] == 20


def test_chunks_of_logits_do_not_change_what_is_stored(teacher_dir, tmp_path, monkeypatch):
    """The teacher's logits are computed for some tokens at a time; the chunk size has no effect."""
    whole = cache(teacher_dir, tmp_path / "a", codec=SAMPLED)
    monkeypatch.setattr(caching, "CHUNK_ELEMENTS", {"cpu": 33 * VOCAB})
    assert contents_of(cache(teacher_dir, tmp_path / "b", codec=SAMPLED)) == contents_of(whole)
