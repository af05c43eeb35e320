"""Test `litgpt distill`: its students, its arguments, and rejected input."""

import inspect
import json
import typing
from dataclasses import asdict
from pathlib import Path

import litgpt.pretrain
import pytest
import torch
import torch.nn.functional as F
import yaml
from litgpt import GPT
from litgpt.args import EvalArgs
from litgpt.utils import CLI
from test_train import SEQ, VOCAB, TokenData, checkpoint, config, read_metrics, rows, run, same, train_args

from litgpt_whittle.checkpoint import check_checkpoint, load_model, read_weights, save_checkpoint
from litgpt_whittle.commands import distill as distill_command
from litgpt_whittle.commands.distill import setup
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.errors import UserError
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, extract_weights


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    """Train a teacher with the command itself."""
    folder = tmp_path_factory.mktemp("teacher")
    train = train_args(max_tokens=60 * 8 * SEQ, global_batch_size=4)
    run(folder, model_config=config(n_embd=48, n_layer=3), train=train)
    return folder / "final"


def tokenizer(folder, *, swapped=False):
    """Add a word-level tokenizer to a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {f"w{i}": i for i in range(VOCAB)}
    if swapped:
        words["w0"], words["w1"] = 1, 0
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w2", "tokenizer_class": "LlamaTokenizer"}))
    return folder


# -- arguments


DIFFERENT = {
    "model_name": "a student checkpoint or sub-network may take its place, so it is optional",
    "out_dir": "out/distill instead of out/pretrain",
    "train": "litgpt's arguments and some more",
}
ADDED = {"teacher_checkpoint_dir", "teacher_cache", "sub_network", "repair", "random_weights", "distill", "compile"}
ADDED |= {"strategy", "teacher_placement", "teacher_quantize"}
ADDED |= {"activation_checkpointing", "checkpoint_type", "dry_run"}


def test_arguments_are_those_of_litgpt_pretrain_field_by_field():
    theirs, ours = (inspect.signature(function).parameters for function in (litgpt.pretrain.setup, setup))
    their_types, our_types = (typing.get_type_hints(function) for function in (litgpt.pretrain.setup, setup))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert set(ours) - set(theirs) == ADDED
    for name in set(theirs) - set(DIFFERENT):
        assert our_types[name] == their_types[name], name
        assert ours[name].default == theirs[name].default, name
        assert ours[name].kind == theirs[name].kind, name
    assert issubclass(our_types["train"], their_types["train"])
    untied = asdict(theirs["train"].default)
    assert untied.pop("tie_embeddings") is False and ours["train"].default.tie_embeddings is None  # unchanged
    assert untied.items() <= asdict(ours["train"].default).items()


def cli(*args):
    CLI(setup, args=[str(arg) for arg in args])


def test_a_full_pretrain_config_is_a_valid_config(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        CLI(litgpt.pretrain.setup, args=["pythia-14m", "--data", "test_train.TokenData", "--print_config"])
    printed = capsys.readouterr().out
    assert {"data", "train", "eval", "optimizer", "logger_name"} <= yaml.safe_load(printed).keys()
    (tmp_path / "pretrain.yaml").write_text(printed)
    short = ["--train.max_tokens", 2 * 4 * SEQ, "--train.global_batch_size", 4, "--train.max_seq_length", SEQ]
    flags = ["--distill.beta", 0, "--compile", "false", "--precision", "32-true", "--out_dir", tmp_path / "out"]
    cli("--config", tmp_path / "pretrain.yaml", *short, *flags)
    assert check_checkpoint(tmp_path / "out" / "final").name == "pythia-14m"
    assert len(rows(tmp_path / "out")) == 2


def test_the_saved_hyperparameters_are_a_config_that_repeats_the_run(tmp_path, teacher_dir):
    first = run(tmp_path / "a", teacher_checkpoint_dir=teacher_dir, distill=DistillArgs(temperature=2.0))
    cli("--config", tmp_path / "a" / "final" / "hyperparameters.yaml", "--out_dir", tmp_path / "b")
    assert same(first, load_model(tmp_path / "b" / "final").state_dict())


def test_the_help_shows_what_a_student_learns_from(capsys):
    with pytest.raises(SystemExit):
        cli("--help")
    shown = capsys.readouterr().out
    for flag in ("--teacher_checkpoint_dir", "--sub_network", "--distill.temperature", "--train.max_tokens"):
        assert flag in shown


# -- students


def cut(teacher_dir, **keeps):
    return SubNet(check_checkpoint(teacher_dir), **keeps)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow), "bf16-true"])
def test_a_student_comes_nearer_to_its_teacher(tmp_path, teacher_dir, precision):
    run(
        tmp_path,
        teacher_checkpoint_dir=teacher_dir,
        distill=DistillArgs(),
        precision=precision,
        train=train_args(max_tokens=40 * 8 * SEQ),
    )
    logged = rows(tmp_path)
    for row in logged:
        expected = 0.2 * row["ce"] + 0.8 * 0.9**2 * row["distill"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4)
    assert logged[-1]["distill"] < 0.5 * logged[0]["distill"]
    teacher = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "teacher_val_loss" in row]
    assert len(teacher) == 1


def test_the_teachers_logged_perplexity_is_that_of_litgpts_model(tmp_path, teacher_dir):
    run(tmp_path, teacher_checkpoint_dir=teacher_dir, distill=DistillArgs(), train=train_args(max_steps=1))
    model = GPT(check_checkpoint(teacher_dir))
    model.load_state_dict(torch.load(teacher_dir / "lit_model.pth"))
    data = TokenData()
    data.connect(max_seq_length=SEQ)
    ids = data.samples(8, 1)
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["teacher_val_loss"] == pytest.approx(expected, abs=1e-5)


def test_the_first_loss_is_the_papers_formula_on_litgpts_logits(tmp_path, teacher_dir):
    subnet = cut(teacher_dir, n_embd=32, n_layer=2)
    student_dir = tmp_path / "student"
    save_checkpoint(student_dir, subnet, extract_weights(read_weights(teacher_dir), subnet))
    data = TokenData(n_train=8)
    run(
        tmp_path / "out",
        initial_checkpoint_dir=student_dir,
        teacher_checkpoint_dir=teacher_dir,
        distill=DistillArgs(),
        data=data,
        train=train_args(max_steps=1),
    )
    student, teacher = (load_model(folder) for folder in (student_dir, teacher_dir))
    ids = data.samples(8, 0)  # all of the data, in any order
    z, t = (model(ids[:, :-1]).flatten(0, 1).double() for model in (student, teacher))
    p, q = (torch.softmax(x / 0.9, -1) for x in (t, z))
    ce = F.cross_entropy(z, ids[:, 1:].flatten())
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    row = rows(tmp_path / "out")[0]
    assert row["ce"] == pytest.approx(ce.item(), abs=1e-5)
    assert row["distill"] == pytest.approx(kl.item(), abs=1e-5)
    assert row["loss"] == pytest.approx((0.2 * ce + 0.8 * 0.81 * kl).item(), abs=1e-5)


@pytest.mark.parametrize("intermediate_size", [128, [64, 128]])
def test_a_sub_network_cut_on_the_fly_trains_like_the_extracted_one(tmp_path, teacher_dir, intermediate_size):
    """Uniform and layer-wise; the latter trains in its true shape and is saved padded."""
    subnet = cut(teacher_dir, n_embd=32, n_layer=2, intermediate_size=intermediate_size)
    subnet.save(tmp_path / "best.yaml")
    save_checkpoint(tmp_path / "student", subnet, extract_weights(read_weights(teacher_dir), subnet))
    common = {"teacher_checkpoint_dir": teacher_dir, "distill": DistillArgs()}
    from_yaml = run(tmp_path / "a", sub_network=tmp_path / "best.yaml", **common)
    from_checkpoint = run(tmp_path / "b", initial_checkpoint_dir=tmp_path / "student", **common)
    assert same(from_yaml, from_checkpoint)

    final = tmp_path / "a" / "final"
    saved = yaml.safe_load((final / "sub_network.yaml").read_text())
    assert SubNet.from_dict(check_checkpoint(teacher_dir), saved) == subnet
    opened, stock = load_model(final), GPT(check_checkpoint(final))
    assert isinstance(opened, LayerwiseGPT) == isinstance(intermediate_size, list)
    stock.load_state_dict(torch.load(final / "lit_model.pth", weights_only=True))
    idx = torch.arange(SEQ).unsqueeze(0)
    assert torch.allclose(opened(idx), stock(idx), atol=1e-5)


def test_random_weights_take_the_architecture_alone(tmp_path, teacher_dir):
    subnet = cut(teacher_dir, n_embd=32, n_layer=2, intermediate_size=128)
    save_checkpoint(tmp_path / "student", subnet, extract_weights(read_weights(teacher_dir), subnet))
    plain = {"distill": DistillArgs(beta=0.0)}
    taken = run(tmp_path / "a", initial_checkpoint_dir=tmp_path / "student", random_weights=True, **plain)
    assert same(taken, run(tmp_path / "b", model_config=subnet.config, **plain))


def test_a_layerwise_student_resumes_bit_for_bit(tmp_path, teacher_dir):
    cut(teacher_dir, n_embd=32, n_layer=2, intermediate_size=[64, 128]).save(tmp_path / "best.yaml")
    kwargs = {
        "sub_network": tmp_path / "best.yaml",
        "teacher_checkpoint_dir": teacher_dir,
        "distill": DistillArgs(),
        "train": train_args(save_interval=2),
    }
    unbroken = run(tmp_path / "a", **kwargs)
    assert same(unbroken, run(tmp_path / "b", resume=tmp_path / "a" / "step-00000002", **kwargs))


@pytest.mark.slow
def test_a_compiled_student_trains_like_an_uncompiled_one(tmp_path, teacher_dir, monkeypatch):
    """Uses the compiler's front end, which our modules could break; the back end is PyTorch's."""
    compile, compiled = torch.compile, []

    def eager(module, **kwargs):
        compiled.append(module)
        return compile(module, **(kwargs | {"backend": "aot_eager"}))

    kwargs = {"teacher_checkpoint_dir": teacher_dir, "distill": DistillArgs(), "train": train_args(max_steps=3)}
    expected = run(tmp_path / "a", **kwargs)
    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setattr(distill_command, "check_compiler", lambda device: None)
    got = run(tmp_path / "b", compile=True, **kwargs)
    assert compiled
    assert got.keys() == expected.keys(), "no _orig_mod in the names"
    assert [row["loss"] for row in rows(tmp_path / "b")] == pytest.approx([row["loss"] for row in rows(tmp_path / "a")])


def test_tokenizer_files_come_from_the_teacher_where_nobody_names_others(tmp_path):
    teacher = tokenizer(checkpoint(tmp_path / "teacher"))
    run(tmp_path / "out", teacher_checkpoint_dir=teacher, distill=DistillArgs(), train=train_args(max_steps=1))
    final = tmp_path / "out" / "final"
    assert (final / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()


def test_tensorboard_falls_back_to_csv_where_it_is_missing(tmp_path, monkeypatch):
    import litgpt_whittle.training.checks as checks

    choose = checks.choose_logger

    def without_tensorboard(logger_name, *args, **kwargs):
        if logger_name != "csv":
            raise ModuleNotFoundError(logger_name)
        return choose(logger_name, *args, **kwargs)

    monkeypatch.setattr(checks, "choose_logger", without_tensorboard)
    with pytest.warns(UserWarning, match="--logger_name csv"):
        run(tmp_path, logger_name="tensorboard", train=train_args(max_steps=1))
    assert list((tmp_path / "logs" / "csv").rglob("metrics.csv"))


def test_a_teacher_no_larger_than_its_student_is_warned_of(teacher_dir, tmp_path):
    step = {"train": train_args(max_steps=1), "distill": DistillArgs(), "model_config": None}
    with pytest.warns(UserWarning, match="the teacher has .* parameters, no more than the student's .* swapped"):
        run(tmp_path, initial_checkpoint_dir=teacher_dir, teacher_checkpoint_dir=teacher_dir, **step)


# -- rejected input


def refuse(tmp_path, match, **kwargs):
    """Assert a one-line error, with nothing written or loaded."""
    out_dir = kwargs.pop("out_dir", tmp_path / "out")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=match) as refused:
        run(out_dir, **kwargs)
    assert "\n" not in str(refused.value)
    # a logger creates its folder when it is chosen, before the data is read
    assert {path for path in tmp_path.rglob("*") if "logs" not in path.parts} - {tmp_path / "out"} == before


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"alpha": 0, "beta": 0}, "must not both be 0"),
        ({"alpha": -0.1}, "distill.alpha must be 0 or more, got -0.1"),
        ({"beta": float("nan")}, "distill.beta must be 0 or more, got nan"),
        ({"temperature": 0}, "distill.temperature must be above 0, got 0"),
        ({"temperature": -1.0}, "distill.temperature must be above 0, got -1.0"),
    ],
)
def test_losses_that_make_no_sense_are_refused(kwargs, match):
    with pytest.raises(UserError, match=match):
        DistillArgs(**kwargs)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"distill": DistillArgs()}, "needs a teacher; set --teacher_checkpoint_dir"),
        ({"distill": DistillArgs(loss="no_such_loss")}, "no_such_loss"),
        ({"distill": DistillArgs(loss={"jensen_shannon": {"beta": 3.0}})}, "beta must be between 0 and 1, got 3.0"),
        ({"distill": DistillArgs(loss={"jensen_shannon": {"beta": "x"}})}, "shannon cannot be computed with .*'x'"),
        ({"logger_name": "wandb"}, "wandb is not installed; install it or use --logger_name csv"),
        ({"teacher_checkpoint_dir": Path("no/such/dir")}, "no checkpoint directory 'no/such/dir'"),
        ({"initial_checkpoint_dir": Path("no/such/dir")}, "no checkpoint directory 'no/such/dir'"),
        ({"sub_network": Path("best.yaml")}, "set --teacher_checkpoint_dir"),
        (
            {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {}, "rate": "1e-3"}},
            "'rate': 0.001.* cannot be created .*unexpected keyword argument 'rate'",
        ),
        ({"optimizer": {"lr": "1e-3"}}, "optimizer needs a class_path, got 'lr'"),
        ({"model_config": None}, "there is no student"),
        ({"model_config": None, "model_name": "no-such-model"}, "'no-such-model'"),
        ({"resume": True}, "nothing to resume"),
        ({"resume": Path("no/such/dir")}, "resume must be a checkpoint directory"),
        ({"resume": True, "initial_checkpoint_dir": Path("x")}, "set only one"),
        ({"sub_network": Path("best.yaml"), "initial_checkpoint_dir": Path("x")}, "set only one"),
        ({"devices": 64}, "devices must be at most"),
        ({"devices": 0}, "devices must be 'auto' or a number from 1, got 0"),
        ({"num_nodes": 2}, "num_nodes = 2 needs every machine to know its rank; start each with torchrun"),
        ({"train": train_args(global_batch_size=6)}, "must be a multiple of .* got 6 and 4"),
        ({"train": train_args(max_seq_length=SEQ + 1)}, "student's block_size 8, got 9"),
        ({"train": train_args(max_tokens=3)}, "training must take at least one step of 64 tokens"),
        ({"train": train_args(max_tokens=None)}, "training has no end"),
        ({"train": train_args(epochs=1)}, "train.epochs is not supported"),
        ({"eval": EvalArgs(max_new_tokens=5)}, "eval.max_new_tokens is not supported"),
        ({"eval": EvalArgs(interval=0)}, "eval.interval must be 1 or more, got 0"),
        ({"data": TokenData(n_train=3)}, "training data must fill at least one batch of 4 samples of 9 tokens"),
        ({"data": TokenData(n_val=0)}, "validation data must fill at least one batch"),
        ({"tokenizer_dir": Path("no/such/dir")}, "tokenizer_dir must contain"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, kwargs, match):
    refuse(tmp_path, match, **kwargs)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, "is not a litgpt checkpoint", teacher_checkpoint_dir=tmp_path / "empty", distill=DistillArgs())


def test_an_out_dir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refuse(tmp_path, "out_dir must be", out_dir=tmp_path / "file" / "out")
    refuse(tmp_path, "out_dir must be a folder", out_dir=tmp_path / "file")


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path):
    teacher = checkpoint(tmp_path / "teacher", padded_vocab_size=128)
    match = "same number of vocabulary entries, .* got 128 and 100 entries, and .* has no tokenizer"
    refuse(tmp_path, match, teacher_checkpoint_dir=teacher, distill=DistillArgs())


def test_a_teacher_with_a_shorter_block_is_refused(tmp_path):
    teacher = checkpoint(tmp_path / "teacher", block_size=4)
    refuse(tmp_path, "teacher's block_size 4, got 8", teacher_checkpoint_dir=teacher, distill=DistillArgs())


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path):
    """With a tokenizer in the student's checkpoint, and with --tokenizer_dir."""
    teacher = tokenizer(checkpoint(tmp_path / "teacher"), swapped=True)
    student = tokenizer(checkpoint(tmp_path / "student"))
    common = {"teacher_checkpoint_dir": teacher, "distill": DistillArgs()}
    refuse(tmp_path, "same tokenizer", initial_checkpoint_dir=student, **common)
    refuse(tmp_path, "same tokenizer", tokenizer_dir=student, **common)


def test_damaged_teacher_weights_are_refused(tmp_path):
    teacher = checkpoint(tmp_path / "teacher")
    weights = teacher / "lit_model.pth"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated or damaged"):
        run(tmp_path / "out", teacher_checkpoint_dir=teacher, distill=DistillArgs())


@pytest.fixture(scope="module")
def ended(teacher_dir, tmp_path_factory):
    """Return a finished run."""
    out_dir = tmp_path_factory.mktemp("ended") / "out"
    run(out_dir, teacher_checkpoint_dir=teacher_dir, distill=DistillArgs())
    return out_dir


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"train": train_args(micro_batch_size=2)}, "train.micro_batch_size was 4 and is 2"),
        ({"train": train_args(max_tokens=512, save_interval=1)}, "train.max_tokens was 384 and is 512"),
        ({"data": TokenData(n_train=32)}, "data.init_args.n_train was 24 and is 32"),
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"precision": "bf16-mixed"}, "precision was 32-true and is bf16-mixed"),
        ({"distill": DistillArgs(beta=0.5)}, "distill.beta was 0.8 and is 0.5"),
        ({"optimizer": "SGD", "seed": 1}, "optimizer was None and is SGD, .*seed was 42 and is 1"),
    ],
)
def test_resuming_under_other_settings_is_refused_by_name(ended, teacher_dir, changed, match):
    common = {"teacher_checkpoint_dir": teacher_dir, "distill": DistillArgs()}
    with pytest.raises(UserError, match=match):
        run(ended, resume=True, **(common | changed))


def test_resuming_with_another_teacher_of_the_same_shape_is_refused(tmp_path):
    teachers = [checkpoint(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    run(tmp_path / "out", teacher_checkpoint_dir=teachers[0], distill=DistillArgs(), train=train_args(max_steps=1))
    with pytest.raises(UserError, match="teacher_checkpoint_dir's weights was"):
        run(
            tmp_path / "out",
            teacher_checkpoint_dir=teachers[1],
            distill=DistillArgs(),
            train=train_args(max_steps=1),
            resume=True,
        )


def test_checkpoints_from_strangers_cannot_run_code(tmp_path):
    """A malicious pickle would write a file on loading."""

    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    run(tmp_path / "out", train=train_args(max_steps=1))
    torch.save({"settings": Malicious()}, tmp_path / "out" / "final" / "training_state.pth")
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path / "out", train=train_args(max_steps=1), resume=True)
    assert not (tmp_path / "owned").exists()
