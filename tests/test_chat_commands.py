"""Test commands on conversations: only the assistant's answers count in losses, scores and repairs."""

import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from checkpoints import write_random_model
from litgpt import GPT
from litgpt.args import EvalArgs
from litgpt.config import Config
from litgpt.tokenizer import Tokenizer
from test_chat import chats, opened, write_chat_tokenizer, write_chats

from litgpt_whittle.batches import BatchArgs, calibration_windows, held_out_windows, validation_batches
from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.commands import cache_teacher, distill
from litgpt_whittle.commands.extract import setup as extract
from litgpt_whittle.commands.rank import setup as rank
from litgpt_whittle.commands.search import setup as search
from litgpt_whittle.data import HFText
from litgpt_whittle.data.loading import split_batch
from litgpt_whittle.data.tokenizer_content import encoding_fingerprint
from litgpt_whittle.distillation.args import DistillArgs, HiddenArgs
from litgpt_whittle.errors import UserError
from litgpt_whittle.fitness import Perplexity
from litgpt_whittle.metrics_log import read_metrics
from litgpt_whittle.pipeline import command as pipeline
from litgpt_whittle.pipeline.kinds import DistillStage
from litgpt_whittle.pipeline.stage import StageRun
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.tensors import IGNORE_INDEX
from litgpt_whittle.tokenizer_files import copy_tokenizer
from litgpt_whittle.training.args import TrainArgs

LENGTH = 32
VOCAB = 320
TEACHER = Config.from_name(
    "Llama-3.2-1B", n_layer=3, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=48, block_size=LENGTH,
    vocab_size=VOCAB, padded_vocab_size=VOCAB,
)  # fmt: skip
HALF = SubNet(TEACHER, n_embd=16, n_layer="0,2", n_query_groups=1, intermediate_size=24)
SEEN = BatchArgs(micro_batch_size=4, max_seq_length=LENGTH)
KL = re.compile(r"predictions are ([\d.]+) nats per token from the teacher's \(KL on ([\d,]+) validation tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a teacher with a chat template, conversations, and a sub-network."""
    folder = tmp_path_factory.mktemp("commands")
    write_random_model(write_chat_tokenizer(folder / "teacher"), TEACHER, norm_mean=1.0)
    write_chats(folder / "chat.jsonl", chats(150))
    write_chats(folder / "val.jsonl", chats(30, seed=1))
    HALF.save(folder / "half.yaml")
    return folder


def data(folder) -> HFText:
    return HFText(path=str(folder / "chat.jsonl"), val_path=str(folder / "val.jsonl"))


def connected(folder) -> HFText:
    return opened(folder / "teacher", folder / "chat.jsonl", LENGTH, val_path=str(folder / "val.jsonl"))


def run(folder, out_dir, **changes):
    settings = {
        "sub_network": folder / "half.yaml",
        "teacher_checkpoint_dir": folder / "teacher",
        "out_dir": out_dir,
        "data": data(folder),
        "train": TrainArgs(micro_batch_size=2, global_batch_size=4, max_steps=2, max_seq_length=LENGTH, log_interval=1),
        "eval": EvalArgs(interval=10, max_iters=2),
        "precision": "32-true",
        "compile": False,
        "logger_name": "csv",
    }
    distill.setup(**(settings | changes))
    return read_metrics(out_dir / "metrics.jsonl")


def stock(path) -> GPT:
    model = GPT(Config.from_checkpoint(path))
    model.load_state_dict(torch.load(path / "lit_model.pth", weights_only=True))
    return model.double().eval().requires_grad_(False)


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher ‖ student) of logits (N, V), one value per token."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_distillation_learns_from_answers_only(folder, tmp_path):
    """The oracle runs stock litgpt on the first step's batches, and leaves all other positions out."""
    extract(folder / "teacher", folder / "half.yaml", tmp_path / "student")
    hidden = HiddenArgs(weight=1.0)
    rows = run(folder, tmp_path / "out", distill=DistillArgs(alpha=0.5, beta=0.5, temperature=1.0, hidden=hidden))
    teacher, student = stock(folder / "teacher"), stock(tmp_path / "student")
    streams = {}
    for net, layers in ((teacher, (0, 2)), (student, (0, 1))):
        for place, layer in enumerate(layers):
            keep = lambda _, x, y, key=(net, place): streams.update({key: y})
            net.transformer.h[layer].register_forward_hook(keep)
    stream = iter(connected(folder).train_dataloader())
    sums, n = torch.zeros(3, dtype=torch.float64), 0
    for _ in range(2):  # micro-batches
        ids, targets = split_batch(next(stream), LENGTH)
        counts = targets != IGNORE_INDEX
        assert 0 < counts.sum() < counts.numel()
        theirs, ours = (net(ids)[counts] for net in (teacher, student))
        sums[0] += F.cross_entropy(ours, targets[counts], reduction="sum")
        sums[1] += divergence(theirs, ours).sum()
        for place in range(2):
            target = streams[teacher, place][counts][:, HALF.n_embd.indices]
            off = (streams[student, place][counts] - target).square().sum(-1) / target.square().sum(-1)
            sums[2] += off.sum() / 2
        n += int(counts.sum())
    first = next(row for row in rows if "ce" in row)
    expected = (sums / n).tolist()
    assert [first["ce"], first["distill"], first["hidden"]] == pytest.approx(expected, rel=1e-4)
    assert first["loss"] == pytest.approx(0.5 * expected[0] + 0.5 * expected[1] + expected[2], rel=1e-4)
    # validation, too
    loader, total, n = connected(folder).val_dataloader(), 0.0, 0
    for raw in list(loader)[:2]:
        ids, targets = split_batch(raw, LENGTH)
        counts = targets != IGNORE_INDEX
        total, n = (
            total + float(F.cross_entropy(teacher(ids)[counts], targets[counts], reduction="sum")),
            n + counts.sum(),
        )
    logged = next(row["teacher_val_loss"] for row in rows if "teacher_val_loss" in row)
    assert logged == pytest.approx(total / int(n), rel=1e-4)


def test_the_fingerprint_of_a_tokenizer_does_not_depend_on_its_folders_name(folder, tmp_path):
    """litgpt's `use_bos` is true in a folder named Llama-3…, which resumed runs have left."""
    names = ("Llama-3-tiny", "step-00000010")
    copies = [copy_of_tokenizer(folder / "teacher", tmp_path / name) for name in names]
    for copy in copies:
        path = copy / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}))
    assert [Tokenizer(copy).use_bos for copy in copies] == [True, False]
    one, other = map(encoding_fingerprint, copies)
    assert one == other


def test_a_run_resumes_with_an_equal_tokenizer_in_another_folder_but_not_with_another_one(folder, tmp_path):
    moved, other = (copy_of_tokenizer(folder / "teacher", tmp_path / name) for name in ("moved", "other"))
    path = moved / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    (other / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    train = TrainArgs(micro_batch_size=2, global_batch_size=2, max_steps=1, max_seq_length=LENGTH, log_interval=1)
    settings = {"train": train, "tokenizer_dir": folder / "teacher"}
    run(folder, tmp_path / "out", **settings)
    run(folder, tmp_path / "out", **settings | {"tokenizer_dir": moved}, resume=True)
    with pytest.raises(UserError, match="tokenizer's content was [0-9a-f]{16} and is [0-9a-f]{16}; change back"):
        run(folder, tmp_path / "out", **settings | {"tokenizer_dir": other}, resume=True)

    def options(folder):
        run = StageRun(DistillStage, "distill", tmp_path, {"tokenizer_dir": str(folder)})
        return run.determining_options

    assert options(folder / "teacher") == options(moved) != options(other)
    assert options(tmp_path) == {"tokenizer_dir": str(tmp_path)}  # the command refuses it


def copy_of_tokenizer(source, folder):
    folder.mkdir()
    copy_tokenizer(source, folder)
    return folder


def test_a_cached_teacher_teaches_answers_as_a_live_one_does(folder, tmp_path):
    cache_teacher.setup(
        folder / "teacher", data(folder), tmp_path / "cache", codec="full", train=cache_teacher.WindowArgs(4, LENGTH)
    )
    cached = {"teacher_checkpoint_dir": None, "teacher_cache": tmp_path / "cache", "sub_network": None}
    extract(folder / "teacher", folder / "half.yaml", tmp_path / "student")
    live = run(folder, tmp_path / "live", sub_network=None, initial_checkpoint_dir=tmp_path / "student")
    found = run(folder, tmp_path / "out", initial_checkpoint_dir=tmp_path / "student", **cached)
    for name in ("ce", "distill"):
        pairs = zip(*([row[name] for row in rows if name in row] for rows in (live, found)), strict=True)
        assert all(one == pytest.approx(other, rel=1e-3) for one, other in pairs)


@pytest.mark.parametrize("changes", [{}, {"refine_passes": 1}])
def test_a_repair_is_trained_and_judged_on_answers(changes, folder, tmp_path, capsys):
    args = RepairArgs(tokens=3000, **changes)
    extract(folder / "teacher", folder / "half.yaml", tmp_path / "s", repair=args, data=data(folder), train=SEEN)
    printed, n = KL.search(capsys.readouterr().out).groups()
    text = connected(folder)
    windows = calibration_windows(text, LENGTH, 3000)
    held_out = held_out_windows(text, LENGTH, windows.input_ids.shape[1], 3000 // LENGTH // 4)
    counts = held_out.targets != IGNORE_INDEX
    assert int(n.replace(",", "")) == counts.sum() < counts.numel()
    with torch.no_grad():
        theirs, ours = (stock(path)(held_out.input_ids)[counts] for path in (folder / "teacher", tmp_path / "s"))
    assert float(printed) == pytest.approx(float(divergence(theirs, ours).mean()), abs=2e-3)


def test_candidates_are_scored_on_answers(folder, tmp_path):
    batches = validation_batches(connected(folder), LENGTH, 4)
    model = load_model(folder / "teacher", "SuperGPT")
    oracle, losses = stock(folder / "teacher"), []
    with torch.no_grad():
        for ids, targets in batches:
            losses += F.cross_entropy(oracle(ids).flatten(0, 1), targets.flatten(), reduction="none")[
                targets.flatten() != IGNORE_INDEX
            ].tolist()
    score = Perplexity(model, batches)(SubNet.full(TEACHER))["perplexity"]
    assert score == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_ranking_and_search_take_conversations(folder, tmp_path):
    settings = {"data": data(folder), "train": SEEN}
    rank(folder / "teacher", out_dir=tmp_path / "rank", tokens=1024, layer_tokens=256, **settings)
    search(
        folder / "teacher", bin="30k", out_dir=tmp_path / "search", strategy="RandomSearch", iterations=2,
        simple_starts=False, **settings,
    )  # fmt: skip
    assert (tmp_path / "search/best.yaml").is_file() and (tmp_path / "rank/importance.pt").is_file()


class Checked(Exception):
    """Raised once a pipeline has checked its stages."""


def test_a_pipeline_finds_the_teachers_template(folder, tmp_path, monkeypatch):
    def stop(*_):
        raise Checked

    monkeypatch.setattr(pipeline, "measure_speed", stop)
    batch = {"micro_batch_size": 2, "max_seq_length": LENGTH}
    train = batch | {"global_batch_size": 4, "max_tokens": 768, "lr_warmup_steps": 1, "save_interval": None}
    sections = {"rank": {"tokens": 256, "layer_tokens": 0, "train": batch}, "search": {"iterations": 2, "train": batch}}
    sections |= {"distill": {"precision": "32-true", "compile": False, "train": train}, "cache_teacher": False}
    bare = tmp_path / "bare"
    shutil.copytree(folder / "teacher", bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="need a chat template, and the checkpoint has none"):
        pipeline.setup(bare, "30k", data(folder), tmp_path / "out", dry_run=True, **sections)
    cascade = {"target": "30k,18k", "cascade": True}  # the second student's teacher does not exist yet
    for more in ({}, cascade, {"correct_teacher": {"max_tokens": 256}}):
        settings = {"target": "30k", "data": data(folder), "dry_run": True} | sections | more
        with pytest.raises(Checked):
            pipeline.setup(folder / "teacher", out_dir=tmp_path / "out", **settings)
