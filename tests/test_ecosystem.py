"""Test that the rest of litgpt's commands accept the checkpoints of `extract` and `distill`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from functools import partial

import litgpt.chat.base
import litgpt.pretrain
import numpy as np
import pytest
import torch
import yaml
from checkpoints import write_random_model
from litgpt.api import LLM
from litgpt.args import EvalArgs
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.deploy import serve
from litgpt.eval.evaluate import convert_and_evaluate
from litgpt.finetune import full, lora
from litgpt.generate import base
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.scripts.merge_lora import merge_lora
from litgpt.tokenizer import Tokenizer
from test_train import TokenData, train_args
from texts import write_tokenizer
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.commands.distill import setup as distill
from litgpt_whittle.commands.extract import setup as extract
from litgpt_whittle.commands.pretrain_supernet import super_network
from litgpt_whittle.hf.export import export_hf
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.spaces.args import SpaceArgs
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.training.args import TrainArgs

TEACHER = Config(
    name="Llama-tiny", block_size=64, n_layer=4, n_embd=32, n_head=4, head_size=8, n_query_groups=2, vocab_size=300,
    padded_vocab_size=300, intermediate_size=48, bias=False, norm_class_name="RMSNorm", parallel_residual=False,
    mlp_class_name="LLaMAMLP", rotary_percentage=1.0,
)  # fmt: skip
HF = LlamaConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=48, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip
CHOICES = {
    "uniform": dict(n_embd="0-9,14-19", n_layer="0,2-3", n_query_groups=1, intermediate_size=20),
    "layerwise": dict(n_embd=24, n_layer="0,2-3", n_query_groups=[2, 1, 2], intermediate_size=[20, 7, "1-30"]),
}
NEOX = Config.from_name(
    "pythia-14m", block_size=64, n_layer=4, n_embd=32, n_head=4, vocab_size=300, padded_vocab_size=300,
    intermediate_size=48,
)  # fmt: skip
NEOX_HF = GPTNeoXConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64, rotary_pct=0.25, hidden_act="gelu",
)  # fmt: skip
PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("ecosystem") / "teacher")
    write_random_model(folder, TEACHER)
    HF.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CHOICES)
def extracted(request, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    SubNet(TEACHER, **CHOICES[request.param]).save(folder / "best.yaml")
    extract(teacher, folder / "best.yaml", folder / "student")
    return folder / "student"


@pytest.fixture(scope="module", params=["extracted", "distilled"])
def student(request, extracted, teacher, tmp_path_factory):
    """Return a student as it was cut, and after a step of distillation."""
    if request.param == "extracted":
        return extracted
    folder = tmp_path_factory.mktemp("distilled")
    distill(
        out_dir=folder,
        precision="32-true",
        initial_checkpoint_dir=extracted,
        teacher_checkpoint_dir=teacher,
        data=TokenData(),
        train=train_args(max_tokens=None, max_steps=1, max_seq_length=16, lr_warmup_steps=0),
        eval=EvalArgs(interval=1, max_iters=1),
        devices=1,
        logger_name="csv",
        compile=False,
    )
    return folder / "final"


@pytest.fixture
def stock(monkeypatch):
    """Let litgpt's training scripts run inside a test: no compiler, no parsing of pytest's own command line."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    for script in (full, lora, litgpt.pretrain):
        monkeypatch.setattr(script, "save_hyperparameters", lambda *_: None)


@torch.no_grad()
def greedy(folder, n):
    """Return the greedy continuation of the student in its true shape, as an oracle."""
    model, idx = load_model(folder), Tokenizer(folder).encode(PROMPT)[None]
    for _ in range(n):
        idx = torch.cat((idx, model(idx)[:, -1:].argmax(-1)), 1)
    return Tokenizer(folder).decode(idx[0])


def test_generate_says_what_the_student_says(student, capsys):
    base.main(student, PROMPT, max_new_tokens=8, temperature=0.0, top_k=1, precision="32-true")
    assert greedy(student, 8) in capsys.readouterr().out


def test_the_python_class_says_what_the_student_says(student):
    llm = LLM.load(str(student), distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    assert PROMPT + llm.generate(PROMPT, max_new_tokens=8, temperature=0.0, top_k=1) == greedy(student, 8)


def test_chat_answers(student, capsys, monkeypatch):
    prompts = iter([PROMPT, PROMPT, ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(prompts))
    litgpt.chat.base.main(student, max_new_tokens=8, top_k=1, precision="32-true")
    replies = re.findall(">> Reply: (.*)", capsys.readouterr().out)
    # the end-of-text token that ends a reply is not printed
    said = greedy(student, 8).removeprefix(PROMPT)
    assert len(replies) == 2 and replies[0] and all(said.strip() == reply.strip() for reply in replies)


def test_serve_answers_what_the_student_says(student, monkeypatch):
    pytest.importorskip("litserve", reason="needs the extra 'ecosystem'")
    answers = []

    class Server:
        """Litserve's interface, without its processes and its port."""

        def __init__(self, api, **options):
            self.api = api

        def run(self, **options):
            self.api.setup("cpu")
            answers.append(self.api.encode_response(self.api.predict(self.api.decode_request({"prompt": PROMPT}))))

    monkeypatch.setattr(serve, "LitServer", Server)
    serve.run_server(student, precision="32-true", temperature=0.0, top_k=1, max_new_tokens=8, accelerator="cpu")
    assert PROMPT + answers[0]["output"] == greedy(student, 8)


def finetune_args():
    return dict(
        precision="32-true",
        train=TrainArgs(
            global_batch_size=1, micro_batch_size=1, epochs=1, max_steps=2, max_seq_length=32, lr_warmup_steps=1
        ),
        eval=EvalArgs(interval=10, max_new_tokens=2, max_iters=1, final_validation=False),
    )


@pytest.fixture
def examples(tmp_path):
    (tmp_path / "data.json").write_text(
        json.dumps([{"instruction": "say", "input": "", "output": "the quick brown fox"}] * 4)
    )
    return JSON(tmp_path / "data.json", val_split_fraction=0.5, num_workers=0)


def test_finetune_full_trains_it(extracted, examples, tmp_path, stock):
    full.setup(extracted, tmp_path / "out", data=examples, **finetune_args())
    before, after = load_model(extracted, "SuperGPT"), load_model(tmp_path / "out/final")
    assert after.config == before.config
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)


def test_finetune_lora_trains_it_and_merge_lora_merges(extracted, examples, tmp_path, stock, monkeypatch):
    def save_hyperparameters(function, folder):  # the entries that merge_lora reads
        settings = {"checkpoint_dir": str(extracted), "precision": "32-true"}
        ranks = {"lora_r": 2, "lora_alpha": 16, "lora_dropout": 0.0, "lora_query": True, "lora_key": False}
        ranks |= {"lora_value": True, "lora_projection": False, "lora_mlp": False, "lora_head": False}
        (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(settings | ranks))

    monkeypatch.setattr(lora, "save_hyperparameters", save_hyperparameters)
    lora.setup(extracted, tmp_path / "out", data=examples, lora_r=2, lora_dropout=0.0, **finetune_args())
    final = tmp_path / "out/final"
    (final / "lit_model.pth").unlink(missing_ok=True)  # setup merges the weights itself
    merge_lora(final)
    before, after = load_model(extracted, "SuperGPT"), load_model(final)
    assert after.config == before.config
    assert not torch.equal(after.transformer.h[0].attn.qkv.weight, before.transformer.h[0].attn.qkv.weight)
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)


def test_pretrain_goes_on_from_it(extracted, tmp_path, stock):
    litgpt.pretrain.setup(
        TEACHER.name,
        Config.from_checkpoint(extracted),
        out_dir=tmp_path,
        precision="32-true",
        initial_checkpoint_dir=extracted,
        data=TokenData(),
        train=TrainArgs(
            global_batch_size=1, micro_batch_size=1, max_tokens=32, max_seq_length=16, lr_warmup_steps=0, max_norm=0.0
        ),
        eval=EvalArgs(max_iters=1, initial_validation=False, final_validation=False),
        devices=1,
        logger_name="csv",
    )
    assert load_model(tmp_path / "final").config == Config.from_checkpoint(extracted)


def test_convert_from_litgpt_gives_what_transformers_opens(extracted, tmp_path):
    convert_lit_checkpoint(extracted, tmp_path)
    shutil.copy(extracted / "config.json", tmp_path)
    (tmp_path / "model.pth").rename(tmp_path / "pytorch_model.bin")
    model, idx = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), torch.arange(3, 33)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(idx).logits, load_model(extracted)(idx), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def neox_teacher(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("neox") / "teacher")
    write_random_model(folder, NEOX)
    NEOX_HF.save_pretrained(folder)
    return folder


@pytest.fixture(params=["fine_uniform", "coarse_layerwise"])
def neox_subnet(request, neox_teacher, tmp_path):
    """Return a sub-network of Pythia as in a search, with padded heads, extracted to the folder `student`."""
    space, rng = Space(NEOX, request.param, args=SpaceArgs(convertible=True)), np.random.default_rng(0)
    subnet = next(s for s in (space.sample(rng) for _ in range(100)) if not s.is_uniform and 8 < len(s.n_embd) < 32)
    subnet.save(tmp_path / "best.yaml")
    extract(neox_teacher, tmp_path / "best.yaml", tmp_path / "student")
    return subnet


def test_students_of_pythia_are_converted_and_exported(neox_teacher, neox_subnet, tmp_path):
    (tmp_path / "converted").mkdir()
    convert_lit_checkpoint(tmp_path / "student", tmp_path / "converted")
    (tmp_path / "converted/model.pth").rename(tmp_path / "converted/pytorch_model.bin")
    shutil.copy(tmp_path / "student/config.json", tmp_path / "converted")
    assert export_hf(tmp_path / "student", tmp_path / "exported").notes == ()
    idx = torch.arange(3, 33)[None]
    for folder in ("converted", "exported"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            expected = load_model(tmp_path / "student")(idx)
            torch.testing.assert_close(model(idx).logits, expected, rtol=1e-4, atol=1e-4)
    # it trains in its true shape, and can still be converted
    distill(
        out_dir=tmp_path / "out", precision="32-true", initial_checkpoint_dir=tmp_path / "student",
        teacher_checkpoint_dir=neox_teacher, data=TokenData(), devices=1, logger_name="csv", compile=False,
        train=train_args(max_tokens=None, max_steps=1, max_seq_length=16, lr_warmup_steps=0),
        eval=EvalArgs(interval=1, max_iters=1),
    )  # fmt: skip
    before, after = load_model(tmp_path / "student"), load_model(tmp_path / "out/final")
    assert after.shape == before.shape and after.config == before.config == neox_subnet.config
    assert sum(p.numel() for p in after.parameters()) == n_params(NEOX, neox_subnet)
    assert export_hf(tmp_path / "out/final", tmp_path / "trained").notes == ()
    if neox_subnet.layers_are_alike:  # a super-network works with heads of zeros
        start = super_network(tmp_path / "student", None, None)
        model = start.build()
        model.load_state_dict(start.weights())
        torch.testing.assert_close(model.eval()(idx), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def likeliest(folder, choices):
    """Return the ending that the student in its true shape finds most likely, as an oracle."""
    model, tokenizer, scores = load_model(folder), Tokenizer(folder), []
    start = len(tokenizer.encode(PROMPT))
    for choice in choices:
        idx = tokenizer.encode(f"{PROMPT} {choice}")
        log_probs = model(idx[None])[0].log_softmax(-1)
        scores.append(sum(log_probs[i - 1, idx[i]].item() for i in range(start, len(idx))))
    return scores.index(max(scores))


@pytest.mark.slow  # importing lm-eval alone takes ten seconds
def test_evaluate_measures_it(student, tmp_path, monkeypatch):
    check_evaluate(student, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("neox_subnet")
def test_evaluate_measures_students_of_pythia(tmp_path, monkeypatch):
    check_evaluate(tmp_path / "student", tmp_path, monkeypatch)


def check_evaluate(student, tmp_path, monkeypatch):
    """Assert that lm-eval picks the most likely ending."""
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="needs the extra 'ecosystem'")
    tasks = pytest.importorskip("lm_eval.tasks")
    choices = ["fox", "jugs", "wizards"]
    row = {"text": PROMPT, "choices": choices, "answer": likeliest(student, choices)}
    (tmp_path / "rows.json").write_text(json.dumps(row) + "\n")
    files = {"data_files": {"test": str(tmp_path / "rows.json")}}
    task = {
        "task": "foxes", "dataset_path": "json", "dataset_kwargs": files,
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "text", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "foxes.yaml").write_text(yaml.safe_dump(task))
    local = partial(tasks.TaskManager, include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(evaluator, "TaskManager", local)
    convert_and_evaluate(student, "foxes", out_dir=tmp_path / "out", device="cpu", dtype="float32")
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert results["foxes"]["acc,none"] == 1


@pytest.mark.slow
def test_serve_answers_over_http(extracted):
    pytest.importorskip("litserve", reason="needs the extra 'ecosystem'")
    command = [sys.executable, "-m", "litgpt", "serve", str(extracted), "--port", "8231", "--accelerator", "cpu"]
    server = subprocess.Popen([*command, "--max_new_tokens", "4"], start_new_session=True)
    try:
        request = urllib.request.Request(
            "http://127.0.0.1:8231/predict",
            json.dumps({"prompt": PROMPT}).encode(),
            {"Content-Type": "application/json"},
        )
        for _ in range(120):
            try:
                answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
                break
            except OSError:
                assert server.poll() is None
                time.sleep(1)
        assert answer["output"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # including its child processes
        server.wait()
