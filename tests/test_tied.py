"""Test tied students, whose LM head is their embedding: through every command, in counts, files and configs."""

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT, Config
from litgpt.args import EvalArgs
from litgpt.utils import num_parameters
from test_distill_devices import ARGS, DATA, Code, two_processes
from test_train import SEQ, VOCAB, TokenData, checkpoint, rows, run, same, train_args
from texts import write_word_tokenizer
from transformers import AutoModelForCausalLM

from litgpt_whittle import SubNet
from litgpt_whittle.checkpoint import load_model, read_weights, save_checkpoint
from litgpt_whittle.commands import distill, extract, pretrain_supernet
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.errors import UserError
from litgpt_whittle.hf.export import export_hf
from litgpt_whittle.results import Checkpoint
from litgpt_whittle.supergpt import is_tied, student_model, tie
from litgpt_whittle.training.memory_plan import plan_memory
from litgpt_whittle.training.model_source import ModelSource

LLAMA = Config(
    name="tiny-Llama-2", block_size=SEQ, vocab_size=VOCAB, padded_vocab_size=VOCAB, n_layer=3, n_embd=32, n_head=4,
    intermediate_size=48, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", parallel_residual=False,
    rotary_percentage=1.0,
)  # fmt: skip
ONE_MATRIX = VOCAB * 32


def tied_teacher(folder, shape=None):
    """Make a tied checkpoint with random weights and Hugging Face's config, which declares it."""
    torch.manual_seed(0)
    shape = shape or SubNet.full(LLAMA)
    model = tie(student_model(shape))
    source = folder.parent / "source"
    write_word_tokenizer(source, VOCAB)
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    save_checkpoint(folder, shape, model.state_dict(), source)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tied_teacher(tmp_path_factory.mktemp("tied") / "teacher")


def is_saved_tied(folder, n_params):
    """Return whether a checkpoint, its file and its config hold one matrix, and the expected number of parameters."""
    model, said = load_model(folder), json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert num_parameters(model) == Checkpoint(folder).n_params == n_params
    n_bytes = (folder / "lit_model.pth").stat().st_size - 4 * n_params
    return [model.lm_head.weight is model.transformer.wte.weight, said, n_bytes < 4 * ONE_MATRIX] == [True] * 3


def is_saved_untied(folder, n_params):
    model, said = load_model(folder), json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return (
        num_parameters(model) == Checkpoint(folder).n_params == n_params
        and not said
        and not is_tied(read_weights(folder))
    )


def subnet_file(path):
    SubNet(LLAMA, n_layer=2, intermediate_size=24).save(path)
    return path


def supernet(out_dir, **kwargs):
    pretrain_supernet.setup(
        out_dir=out_dir,
        precision="32-true",
        data=TokenData(),
        train=train_args(max_steps=1, **kwargs.pop("train", {})),
        eval=EvalArgs(interval=2, max_iters=1),
        devices=1,
        logger_name="csv",
        **kwargs,
    )


def test_every_command_keeps_a_tied_student_tied(teacher, tmp_path):
    n_teacher, cut = Checkpoint(teacher).n_params, subnet_file(tmp_path / "cut.yaml")
    extract.setup(teacher, cut, tmp_path / "start")
    n = Checkpoint(tmp_path / "start").n_params
    with torch.device("meta"):
        assert n == num_parameters(GPT(SubNet.load(cut, LLAMA).config)) - ONE_MATRIX
    assert is_saved_tied(tmp_path / "start", n)
    train = {"train": train_args(max_steps=1), "teacher_checkpoint_dir": teacher, "distill": DistillArgs()}
    run(tmp_path / "distilled", initial_checkpoint_dir=tmp_path / "start", **train)
    run(tmp_path / "cut", sub_network=cut, **train)
    run(tmp_path / "random", initial_checkpoint_dir=tmp_path / "start", random_weights=True, **train)
    for name in ("distilled", "cut", "random"):
        assert is_saved_tied(tmp_path / name / "final", n)
    supernet(tmp_path / "supernet", initial_checkpoint_dir=teacher)
    assert is_saved_tied(tmp_path / "supernet/final", n_teacher)


def test_a_layerwise_tied_student_stays_tied_and_is_stored_once(tmp_path):
    shape = SubNet(LLAMA, n_layer=2, intermediate_size=[24, 40])
    start = tied_teacher(tmp_path / "start", shape)
    with torch.device("meta"):
        n = num_parameters(student_model(shape)) - ONE_MATRIX
    run(tmp_path / "out", initial_checkpoint_dir=start, train=train_args(max_steps=1))
    model = load_model(tmp_path / "out/final")
    assert num_parameters(model) == Checkpoint(tmp_path / "out/final").n_params == n and is_tied(model.state_dict())
    n_padded = num_parameters(GPT(shape.config)) - ONE_MATRIX
    assert (tmp_path / "out/final/lit_model.pth").stat().st_size < 4 * (n_padded + ONE_MATRIX)


def test_a_step_of_a_tied_student_is_that_of_transformers(teacher, tmp_path):
    """The matrix's gradient is the sum of the embedding's and the head's."""
    export_hf(teacher, tmp_path / "hf")
    model, data = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), TokenData(n_train=4)
    data.connect(max_seq_length=SEQ)
    ids = data.samples(4, 0)
    F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()

    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    train = train_args(max_steps=1, lr_warmup_steps=0, max_norm=None, global_batch_size=4, tie_embeddings=None)
    weights = run(tmp_path / "out", initial_checkpoint_dir=teacher, data=data, optimizer=sgd, train=train)
    expected = model.get_input_embeddings().weight
    assert expected is model.get_output_embeddings().weight
    assert torch.allclose(weights["lm_head.weight"], expected, atol=1e-6)
    assert not torch.allclose(read_weights(teacher)["lm_head.weight"], expected, atol=1e-3), "it has moved"


@pytest.mark.parametrize("untie", [False, True])
def test_transformers_opens_what_is_saved_with_the_same_logits(untie, teacher, tmp_path):
    kwargs = {"tie_embeddings": False} if untie else {"tie_embeddings": None}
    run(tmp_path / "out", initial_checkpoint_dir=teacher, train=train_args(max_steps=2, **kwargs))
    export_hf(tmp_path / "out/final", tmp_path / "hf", check=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is not untie
    idx = torch.arange(SEQ).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(model(idx).logits, load_model(tmp_path / "out/final")(idx), atol=1e-5)


def test_embeddings_are_untied_on_request_and_both_sizes_are_printed(teacher, tmp_path, caplog):
    n, untied = Checkpoint(teacher).n_params, {"train": train_args(max_steps=2, tie_embeddings=False)}
    run(tmp_path / "out", initial_checkpoint_dir=teacher, **untied)
    supernet(tmp_path / "supernet", initial_checkpoint_dir=teacher, train={"tie_embeddings": False})
    message = f"train.tie_embeddings false unties the LM head: {n:,} parameters become {n + ONE_MATRIX:,}"
    assert caplog.messages.count(message) == 2
    caplog.clear()
    assert is_saved_untied(tmp_path / "out/final", n + ONE_MATRIX)
    run(tmp_path / "more", initial_checkpoint_dir=tmp_path / "out/final", train=train_args(max_steps=1))
    assert message not in caplog.messages and is_saved_untied(tmp_path / "more/final", n + ONE_MATRIX)


@pytest.mark.parametrize("command", [run, supernet])
def test_a_trained_head_is_never_dropped(command, tmp_path):
    start = checkpoint(tmp_path / "start")
    with pytest.raises(UserError, match="^train.tie_embeddings must not be true for a student whose LM head differs"):
        train = {"tie_embeddings": True}
        train = train if command is supernet else train_args(**train)
        command(tmp_path / "out", initial_checkpoint_dir=start, train=train)
    assert not (tmp_path / "out/final").exists()


def test_random_weights_are_tied_on_request_only():
    student = ModelSource.choose(None, None, None, None, LLAMA)
    tied = student.with_tie(True)
    assert (student.with_tie(None).is_tied, tied.is_tied) == (False, True)
    assert student.n_params - tied.n_params == ONE_MATRIX


def test_a_plan_counts_a_tied_matrix_once(teacher, tmp_path, monkeypatch):
    """Also for the teacher; weights and AdamW's two moments for the student."""
    plans = []
    plan = lambda step, *_, **__: (False, str(plans.append(plan_memory(step))))
    monkeypatch.setattr(distill, "choose_placement", plan)
    for tie_embeddings in (None, False):
        train = {"train": train_args(tie_embeddings=tie_embeddings), "distill": DistillArgs()}
        with contextlib.suppress(UserError):  # there is no model to open
            run(tmp_path, initial_checkpoint_dir=teacher, teacher_checkpoint_dir=teacher, dry_run=True, **train)
    tied, untied = plans
    assert untied.weights - tied.weights == 4 * ONE_MATRIX
    assert untied.optimizer - tied.optimizer == 2 * 4 * ONE_MATRIX + 4  # and a step count
    n_rope = 2 * SEQ * LLAMA.rope_n_elem
    assert tied.teacher == untied.teacher == 4 * (Checkpoint(teacher).n_params + n_rope)


@pytest.mark.slow
def test_two_processes_train_a_tied_student_as_one_does(teacher, tmp_path):
    """With FSDP2, whose sharded checkpoints also hold the matrix once."""
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    common = {"initial_checkpoint_dir": teacher, "optimizer": sgd}
    run(tmp_path / "one", data=DATA, eval=EvalArgs(interval=2, max_iters=2), **common)
    args = ARGS | {"distill": Code("DistillArgs(beta=0)"), "checkpoint_type": "sharded"}
    code, printed = two_processes(tmp_path / "two", **args, **common)
    assert code == 0, printed
    n, one = Checkpoint(teacher).n_params, load_model(tmp_path / "one/final").state_dict()
    two = load_model(tmp_path / "two/final").state_dict()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert is_saved_tied(tmp_path / "two/final", n)

    step = tmp_path / "two/step-00000002"
    assert num_parameters(load_model(step)) == n
    parts = [torch.load(path)["weights"] for path in sorted(step.glob("part-*"))]
    assert sum(rows.numel() for part in parts for weight in part.values() for rows in weight.values()) == n
    train, eval = train_args(micro_batch_size=2, save_interval=2), EvalArgs(interval=2, max_iters=4)
    again = {"resume": step, "data": DATA, "optimizer": sgd, "model_config": None, "train": train, "eval": eval}
    assert is_tied(run(tmp_path / "resumed", **again))
    expected, found = (rows(tmp_path / name) for name in ("two", "resumed"))
    # litgpt's learning rate changes with every micro-batch, so it differs slightly after the next step
    assert found[0]["step"] == 3 and found[0]["loss"] == pytest.approx(expected[2]["loss"], abs=1e-5)


def test_a_resumed_run_of_a_tied_student_ends_with_the_same_weights(teacher, tmp_path):
    common = {"train": train_args(save_interval=3), "data": TokenData()}
    expected = run(tmp_path / "whole", initial_checkpoint_dir=teacher, **common)
    found = run(tmp_path / "rest", resume=tmp_path / "whole/step-00000003", model_config=None, **common)
    assert same(expected, found) and is_tied(found) and rows(tmp_path / "rest")[0]["step"] == 4
