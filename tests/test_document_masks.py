"""Test that documents packed into one window do not attend to each other, against each document on its own."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES
from checkpoints import write_random_model
from hypothesis import given
from hypothesis import strategies as st
from litgpt import GPT
from litgpt.args import EvalArgs
from litgpt.config import Config
from litgpt.model import GroupedTopkRouter
from litgpt.tokenizer import Tokenizer
from test_chat import chats, write_chats
from texts import documents, write_jsonl, write_tokenizer

from litgpt_whittle.batches import BatchArgs, BudgetArgs
from litgpt_whittle.commands import cache_teacher, distill, search_run
from litgpt_whittle.commands.rank import RankConfig
from litgpt_whittle.commands.search import setup as search
from litgpt_whittle.data import HFText
from litgpt_whittle.document_masks import Packing, document_mask, documents_in, reset_attention
from litgpt_whittle.errors import UserError
from litgpt_whittle.journal import read_journal
from litgpt_whittle.metrics_log import read_metrics
from litgpt_whittle.strategies import RandomSearch
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import SuperGPT, extract_weights, student_model
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.sharding import checkpoint_activations
from litgpt_whittle.windows import vectorize_windows

END = 3
LENGTHS = (7, 1, 11, 5)
LENGTH = 32
SEARCH = {
    "fitness": "perplexity", "bin": "10K-100K", "iterations": 3, "strategy": RandomSearch(), "precision": "32-true",
    "train": BatchArgs(2, LENGTH), "eval": BudgetArgs(1),
}  # fmt: skip
TEACHER = Config.from_name(
    "Llama-3.2-1B", n_layer=3, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=48, block_size=LENGTH,
    vocab_size=320, padded_vocab_size=320,
)  # fmt: skip


def packed(config, n=2):
    """Return windows of documents that end with END, whose last one is cut, shape (n, 24)."""
    ids = torch.randint(END + 1, config.vocab_size, (n, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    ids[:, torch.tensor(LENGTHS[:-1]).cumsum(0) - 1] = END
    return ids


def alone(model, ids):
    """Return the logits of stock litgpt for each document on its own, joined."""
    return torch.cat([model(part) for part in ids.split(LENGTHS, 1)], 1)


def assert_same(found, expected):
    # litgpt's rotary angles have float32's precision
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "name", ["Llama-3.1-8B", "Gemma-2-2b", "Gemma-3-1b-it", "phi-2", "falcon-7b", "Mixtral-8x7B-v0.1", "latent", "yarn"]
)
@torch.no_grad()
def test_a_window_has_the_logits_of_each_document_alone(name):
    """With sliding windows, soft caps, parallel residuals, experts and latent attention."""
    config = ARCHITECTURES[name]
    torch.manual_seed(0)
    stock, ids = GPT(config).double().eval(), packed(config)
    for module in stock.modules():
        if isinstance(module, GroupedTopkRouter):  # litgpt leaves its weight uninitialised
            torch.nn.init.normal_(module.weight)
    model = reset_attention(vectorize_windows(copy.deepcopy(stock)), Packing(END))
    expected = alone(stock, ids)
    assert_same(model(ids), expected)
    assert (stock(ids) - expected).abs().max() > 1e-3 * expected.abs().max()
    other = packed(config).flip(0)
    assert_same(model(other), alone(stock, other))  # not the masks of the batch before
    if config.n_expert:  # bf16 may choose other experts
        return
    exact = model.float()(ids)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(ids).float(), exact, rtol=0, atol=0.05 * float(exact.abs().max()))


@torch.no_grad()
def test_sub_networks_and_their_students_see_the_same_masks():
    config = ARCHITECTURES["Llama-3.1-8B"]
    torch.manual_seed(0)
    teacher, ids = SuperGPT(config).double().eval(), packed(config)
    subnet = SubNet(config, n_layer="0,2-3", n_embd=20, intermediate_size=[20, 24, 8], drop_attention="2-2")
    student = student_model(subnet).double().eval()
    student.load_state_dict(extract_weights(teacher, subnet))
    expected = alone(student, ids)
    assert_same(reset_attention(student, Packing(END))(ids), expected)
    with reset_attention(teacher, Packing(END)).running(subnet, materialize=True):
        assert_same(teacher(ids), expected)


@pytest.mark.parametrize("way", ["plain", "checkpointed", "compiled"])
def test_gradients_are_those_of_each_document_alone(way):
    config = ARCHITECTURES["Qwen3-0.6B"]
    torch.manual_seed(0)
    stock, ids = GPT(config).double(), packed(config)
    alone(stock, ids).square().mean().backward()
    model = reset_attention(copy.deepcopy(stock), Packing(END))
    model.zero_grad()
    if way == "checkpointed":
        checkpoint_activations(model)
    run = torch.compile(model, backend="eager") if way == "compiled" else model
    run(ids.flip(0))
    run(ids).square().mean().backward()
    for ours, theirs in zip(model.parameters(), stock.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3), st.booleans())
def test_a_token_sees_the_tokens_before_it_back_to_the_end_of_the_last_document(rows, has_bos):
    mask = document_mask(documents_in(torch.tensor(rows), END), torch.float32, has_bos)
    assert mask.shape == (len(rows), 1, 6, 6)
    for row, own in zip(rows, mask[:, 0]):
        for i in range(6):
            seen = [j for j in range(i + 1) if END not in row[j:i] or (has_bos and j == 0)]
            assert own[i].tolist() == [0.0 if j in seen else -math.inf for j in range(6)]


@torch.no_grad()
def test_all_documents_see_the_bos_of_their_block():
    ids = packed(TEACHER)
    model = reset_attention(GPT(TEACHER).eval(), Packing(END, has_bos=True))
    expected, last = model(ids), ids.size(1) - LENGTHS[-1]
    other_document, other_bos = ids.clone(), ids.clone()
    for other, place in ((other_document, 1), (other_bos, 0)):
        other[:, place] = END + 1 + (ids[:, place] - END) % 300
    assert torch.equal(model(other_document)[:, last:], expected[:, last:])
    assert not torch.allclose(model(other_bos)[:, last:], expected[:, last:])


def test_without_an_end_a_model_stays_as_it_is():
    model = reset_attention(GPT(ARCHITECTURES["phi-2"]), None)
    assert all(not module._forward_pre_hooks for module in model.modules())


# -- commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    write_random_model(write_tokenizer(folder / "teacher"), TEACHER, norm_mean=1.0)
    write_jsonl(folder / "text.jsonl", documents(100))
    write_jsonl(folder / "val.jsonl", documents(30, seed=1))
    SubNet(TEACHER, n_embd=16, n_layer="0,2").save(folder / "half.yaml")
    return folder


def text(folder, **settings):
    paths = {"path": str(folder / "text.jsonl"), "val_path": str(folder / "val.jsonl")}
    return HFText(**(paths | {"reset_attention": True} | settings))


def train(folder, out_dir, **changes):
    settings = {
        "sub_network": folder / "half.yaml",
        "teacher_checkpoint_dir": folder / "teacher",
        "out_dir": out_dir,
        "data": text(folder),
        "train": TrainArgs(micro_batch_size=2, global_batch_size=2, max_steps=1, max_seq_length=LENGTH, log_interval=1),
        "eval": EvalArgs(interval=10, max_iters=1, initial_validation=True),
        "precision": "32-true",
        "compile": False,
        "logger_name": "csv",
    }
    distill.setup(**(settings | changes))
    return read_metrics(out_dir / "metrics.jsonl")


def first(rows, name):
    """Return the first value of a name in the rows of a training's metrics."""
    return next(row[name] for row in rows if name in row)


def connected(folder):
    data = text(folder)
    data.connect(Tokenizer(folder / "teacher"), 2, LENGTH)
    data.prepare_data()
    data.setup()
    return data


@torch.no_grad()
def loss(model, data):
    """Return the cross-entropy of stock litgpt on the first validation batch, document by document."""
    sums, n, end = 0.0, 0, data.tokenizer.eos_id
    for row in next(iter(data.val_dataloader())):
        inputs, targets = row[:-1], row[1:]
        cuts = [0, *(i + 1 for i, token in enumerate(inputs.tolist()) if token == end and i + 1 < len(inputs)), LENGTH]
        for begin, stop in zip(cuts, cuts[1:]):
            logits = model(inputs[None, begin:stop])[0]
            sums += float(F.cross_entropy(logits, targets[begin:stop], reduction="sum"))
            n += stop - begin
        assert len(cuts) > 2
    return sums / n


@pytest.fixture(scope="module")
def live(folder, tmp_path_factory):
    """Return the metrics of a training with a live teacher."""
    return train(folder, tmp_path_factory.mktemp("live") / "out")


def test_teacher_and_student_are_measured_document_by_document(folder, live):
    teacher, data = GPT(TEACHER), connected(folder)
    teacher.load_state_dict(torch.load(folder / "teacher/lit_model.pth"))
    subnet = SubNet.load(folder / "half.yaml", TEACHER)
    student = GPT(subnet.config)
    student.load_state_dict(extract_weights(teacher, subnet))
    for name, model in (("teacher_val_loss", teacher), ("val_loss", student)):
        assert first(live, name) == pytest.approx(loss(model.eval(), data), rel=1e-4)


def test_a_cache_has_the_students_masks(folder, live, tmp_path):
    seen = cache_teacher.WindowArgs(micro_batch_size=2, max_seq_length=LENGTH)
    for name, resets in (("reset", True), ("whole", False)):
        data = text(folder, reset_attention=resets)
        stored = {"codec": "full", "max_tokens": 128, "precision": "32-true"}
        cache_teacher.setup(folder / "teacher", data, tmp_path / name, train=seen, **stored)
    cached = train(folder, tmp_path / "cached", teacher_cache=tmp_path / "reset")
    for name in ("loss", "distill"):
        assert first(cached, name) == pytest.approx(first(live, name), rel=1e-2)
    with pytest.raises(UserError, match="data.reset_attention must be false, as for the cache .*, got true; change it"):
        train(folder, tmp_path / "other", teacher_cache=tmp_path / "whole")


def test_candidates_are_scored_document_by_document(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")
    search(folder / "teacher", data=text(folder), out_dir=tmp_path / "search", **SEARCH)
    teacher, data = GPT(TEACHER), connected(folder)
    teacher.load_state_dict(torch.load(folder / "teacher/lit_model.pth"))
    _, evaluations = read_journal(tmp_path / "search/journal.jsonl")
    for evaluation in evaluations:
        subnet = SubNet.from_dict(TEACHER, evaluation.subnet)
        student = student_model(subnet)
        student.load_state_dict(extract_weights(teacher, subnet))
        assert evaluation.scores["nll"] == pytest.approx(loss(student.eval(), data), rel=1e-4)


def test_a_ranking_depends_on_the_masks(folder, tmp_path):
    seen = BatchArgs(2, LENGTH)
    one, other = (
        RankConfig(
            folder / "teacher", text(folder, reset_attention=resets), tmp_path / str(resets), tokens=256,
            layer_tokens=0, train=seen,
        ).run()
        for resets in (True, False)
    )  # fmt: skip
    assert not torch.equal(one.ranking.scores.sublayers["attn"], other.ranking.scores.sublayers["attn"])


def test_repairs_and_conversations_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="data.reset_attention is not for repairs and pruning methods"):
        repairing = SEARCH | {"fitness": "repaired_perplexity"}
        search(folder / "teacher", data=text(folder), out_dir=tmp_path / "rank", **repairing)
    (folder / "teacher/chat_template.jinja").write_text("{{ messages[0].content }}")
    write_chats(tmp_path / "chat.jsonl", chats(9))
    chat = text(folder, path=str(tmp_path / "chat.jsonl"))
    with pytest.raises(UserError, match="data.reset_attention needs texts, .*chat.jsonl' has conversations"):
        train(folder, tmp_path / "out", data=chat)
    assert not (tmp_path / "out").exists() and not (tmp_path / "rank").exists()
