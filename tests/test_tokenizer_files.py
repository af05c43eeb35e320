"""Test that every command copies all tokenizer files, also from read-only folders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from litgpt.prompts import load_prompt_style, save_prompt_style
from test_train import checkpoint
from texts import documents, write_jsonl, write_tokenizer
from transformers import AutoTokenizer, LlamaConfig

from litgpt_whittle import load_model
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.tokenizer_files import copy_tokenizer

SIZES = {
    "n_embd": 32, "vocab_size": 304, "padded_vocab_size": 304, "block_size": 32, "intermediate_size": 48, "bias": False,
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "parallel_residual": False, "rotary_percentage": 1.0,
    "name": "Llama-tiny",
}  # fmt: skip
CHAT = [{"role": "user", "content": "the quick fox"}, {"role": "assistant", "content": "jumps"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}<|endoftext|>{% endfor %}"

COMMANDS = """
import sys
from pathlib import Path
from litgpt.args import EvalArgs
from litgpt.utils import CLI
from litgpt_whittle.commands import cache_teacher, distill, export, extract, pretrain_supernet
from litgpt_whittle.commands import prune
from litgpt_whittle.data import HFText
from litgpt_whittle.spaces.args import SizeArgs, SpaceArgs
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.supernet import SupernetArgs

given, out = map(Path, sys.argv[1:])
teacher, text = given / "teacher", str(given / "corpus.jsonl")
train = TrainArgs(
    save_interval=1, global_batch_size=4, micro_batch_size=4, max_tokens=2 * 4 * 32, max_norm=1.0,
    lr_warmup_steps=1, max_seq_length=32,
)
settings = dict(train=train, eval=EvalArgs(interval=10, max_iters=1), devices=1, precision="32-true", compile=False)
extract.setup(teacher, given / "student.yaml", out / "extract")
prune.setup(teacher, out / "prune", method="magnitude")
cache_teacher.setup(teacher, HFText(text), out / "cache", codec="full")
distill.setup(
    out_dir=out / "distill", initial_checkpoint_dir=given / "student", teacher_checkpoint_dir=teacher,
    data=HFText(text), logger_name="csv", **settings,
)
pretrain_supernet.setup(
    out_dir=out / "pretrain_supernet", initial_checkpoint_dir=teacher, data=HFText(text), logger_name="csv",
    supernet=SupernetArgs(search_space=SpaceArgs(smallest=SizeArgs(n_embd=16, n_query_groups=1))),
    **{name: value for name, value in settings.items() if name != "compile"},
)
for folder in ("extract", "distill/final"):
    export.setup(out / folder, out_dir=out / "export" / folder)
"""
"""All commands that write a checkpoint or a cache, with a teacher, a student, text and settings in one folder"""

WRITTEN = [
    "extract", "prune", "cache", "distill/step-00000001", "distill/final", "pretrain_supernet/final",
    "export/extract", "export/distill/final",
]  # fmt: skip


def write_teacher(folder):
    checkpoint(folder, **SIZES)
    write_tokenizer(folder)
    LlamaConfig(
        vocab_size=304, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "tools: " + TEMPLATE}
    tokenizer.save_pretrained(folder)
    assert (folder / "chat_template.jinja").is_file() and (folder / "additional_chat_templates").is_dir()
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": 0}))
    save_prompt_style("llama3", folder)
    return folder


def under_file_permissions():
    """Return the command prefix that subjects root to file permissions, like any other user."""
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("root may write everywhere, and there is no setpriv to change that")
    return prefix


def set_modes(folder, file_mode, folder_mode):
    for path in [*folder.rglob("*"), folder]:
        path.chmod(folder_mode if path.is_dir() else file_mode)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the commands on read-only inputs; return the input and output folders."""
    given, out = tmp_path_factory.mktemp("given"), tmp_path_factory.mktemp("out")
    write_teacher(given / "teacher")
    checkpoint(given / "student", seed=1, **(SIZES | {"n_embd": 16, "n_layer": 1}))
    copy_tokenizer(given / "teacher", given / "student")
    shutil.copy(given / "teacher/config.json", given / "student")
    write_jsonl(given / "corpus.jsonl", documents(80))
    config = load_model(given / "teacher").config
    SubNet(config, n_embd=16, n_layer=1).save(given / "student.yaml")
    set_modes(given, 0o444, 0o555)
    (out / "commands.py").write_text(COMMANDS)
    command = [*under_file_permissions(), sys.executable, str(out / "commands.py"), str(given), str(out)]
    environment = os.environ | {"XDG_CACHE_HOME": str(out / "user"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    set_modes(given, 0o644, 0o755)  # so that pytest can remove it
    assert done.returncode == 0, done.stderr
    return given, out


@pytest.mark.parametrize("folder", WRITTEN)
def test_files_from_read_only_folders_are_writable_copies(run, folder):
    _, out = run
    files = [path for path in (out / folder).rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path.name for path in files if not path.stat().st_mode & 0o200]


@pytest.mark.parametrize("folder", WRITTEN)
def test_a_chat_is_rendered_and_tokenized_as_by_the_teacher(run, folder):
    """The oracle is transformers with the teacher's own files."""
    given, out = run
    theirs, ours = AutoTokenizer.from_pretrained(given / "teacher"), AutoTokenizer.from_pretrained(out / folder)
    for name in (None, "tool_use"):
        for tokenize in (False, True):
            options = {"tokenize": tokenize, "chat_template": name, "return_dict": False}
            assert ours.apply_chat_template(CHAT, **options) == theirs.apply_chat_template(CHAT, **options)
    assert len(ours) == len(theirs) and ours.special_tokens_map == theirs.special_tokens_map
    name = "generation_config.json"
    assert (out / folder / name).read_bytes() == (given / "teacher" / name).read_bytes()


def test_litgpts_prompt_style_is_kept(run):
    _, out = run
    for folder in WRITTEN:
        if folder.startswith("export"):
            assert not (out / folder / "prompt_style.yaml").exists()
        else:
            assert type(load_prompt_style(out / folder)).__name__ == "Llama3"


def test_the_sizes_in_the_copied_config_are_the_students(run):
    _, out = run
    assert json.loads((out / "extract/config.json").read_text())["hidden_size"] == 16
    assert json.loads((out / "distill/final/config.json").read_text())["num_hidden_layers"] == 1


def test_a_checkpoint_with_named_templates_can_be_replaced(tmp_path):
    from litgpt_whittle.commands.extract import setup

    teacher = write_teacher(tmp_path / "teacher")
    SubNet(load_model(teacher).config, n_embd=16).save(tmp_path / "student.yaml")
    for overwrite in (False, True):
        setup(teacher, tmp_path / "student.yaml", tmp_path / "student", overwrite=overwrite)


def test_all_files_that_transformers_reads_of_a_tokenizer_are_copied(tmp_path):
    """The oracle is the list of vocabulary files of transformers' own tokenizer classes for causal models."""
    from transformers.models import gemma, gpt2, llama, qwen2

    source = write_tokenizer(tmp_path / "source")
    names = {"special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}
    for module, cls in ((gemma, "Gemma"), (gpt2, "GPT2"), (llama, "Llama"), (qwen2, "Qwen2")):
        names |= set(getattr(module, f"{cls}Tokenizer").vocab_files_names.values())
    for name in names - {"tokenizer.json"}:
        (source / name).write_text(name)
    for name in ("lit_model.pth", "model.safetensors", "hyperparameters.yaml"):
        (source / name).write_text(name)
    (out := tmp_path / "out").mkdir()
    copy_tokenizer(source, out)
    assert names | {"tokenizer_config.json"} == {path.name for path in Path(out).iterdir()}
