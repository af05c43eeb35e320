"""Test what `litgpt export` writes besides the model: its card, the tokenizer, and the upload to the Hub."""

import dataclasses
import json
import shutil

import pytest
import yaml
from litgpt.utils import CLI
from test_deci import TEACHER, WIDE, save_student
from test_export import random_weights, save
from texts import documents, write_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from litgpt_whittle.checkpoint import load_model, save_checkpoint
from litgpt_whittle.commands.export import setup
from litgpt_whittle.errors import UserError
from litgpt_whittle.hf import hub
from litgpt_whittle.hf.export import export_hf
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import extract_weights

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)
CHAT = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}]
REPAIR = {"refine_passes": 1, "basis": "pca", "tokens": 4096}


def card(folder):
    """Return the metadata and the text of a model card."""
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


# -- the tokenizer's files


@pytest.mark.parametrize("layout", ["hf", "deci"])
def test_token_ids_chats_and_generation_settings_are_the_teachers(layout, tmp_path):
    teacher = write_tokenizer(tmp_path / "teacher")
    (teacher / "chat_template.jinja").write_text(TEMPLATE)
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|endoftext|>"}))
    GenerationConfig(do_sample=True, temperature=0.3, top_k=7, eos_token_id=[0, 5]).save_pretrained(teacher)
    (teacher / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 3, "eos_token_id": [0, 5]}))
    save_student(tmp_path / "lit", TEACHER, tokenizer_dir=teacher, n_layer=2)
    setup(tmp_path / "lit", format=layout, out_dir=tmp_path / "out", check=False)

    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "teacher"))
    for text in documents(20, seed=3):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    for prompt in (True, False):
        rendered = ours.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert rendered == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert rendered.startswith("<|user|>the quick")
    assert ours.special_tokens_map == theirs.special_tokens_map
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (teacher / name).read_bytes()
    exported = json.loads((tmp_path / "out/config.json").read_text())
    assert (exported["bos_token_id"], exported["eos_token_id"]) == (3, [0, 5])


# -- the model card


def test_the_card_describes_origin_sizes_and_measurements(tmp_path):
    teacher = dataclasses.replace(WIDE["Llama-3.1-8B"], hf_config={"org": "meta-llama", "name": "Meta-Llama-3.1-8B"})
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/README.md").write_text("---\nlicense: other\nlicense_name: l3\nlanguage: [en]\n---\n# A\n")
    subnet = SubNet(teacher, n_layer=3, intermediate_size=[512, 512, 768])
    origin = {
        "teacher": "Llama-3.1-8B", "n_params": 5000, "n_params_teacher": 9000, "repair": REPAIR, "strategy": "EvoPress",
        "bin": "5K", "repaired_perplexity": 12.345, "perplexity": 99.0, "checkpoint_dir": str(tmp_path / "teacher"),
    }  # fmt: skip
    weights = extract_weights(random_weights(teacher), subnet)
    folder = tmp_path / "run/final"
    folder.parent.mkdir()
    save_checkpoint(folder, subnet, weights, sub_network={"provenance": origin})
    arguments = {"distill": {"loss": "forward_kl"}, "data": {"path": "/home/me/secret"}, "seed": 3}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(arguments))
    rows = [{"iter": 0, "teacher_val_loss": 2.0}, {"iter": 4, "step": 2, "val_loss": 3.0},
            {"iter": 8, "step": 4, "val_loss": 2.5}]  # fmt: skip
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setup(folder, format="deci", out_dir=tmp_path / "out", check=False)

    metadata, text = card(tmp_path / "out")
    assert metadata == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": "other",
        "license_name": "l3", "base_model": "meta-llama/Meta-Llama-3.1-8B", "tags": ["litgpt", "litgpt_whittle"],
    }  # fmt: skip
    for part in (
        "with 5,000 of its 9,000 parameters", "| neurons | 512 (×2), 768 |", "| layers | 3 |", "refine_passes: 1",
        "strategy: EvoPress", "loss: forward_kl", "| … after a repair | 12.35 |", "nats per token | 2.5000 |",
        "of the teacher | 2.0000 |", "vllm serve out --trust-remote-code",
    ):  # fmt: skip
        assert part in text
    assert str(tmp_path) not in text and "secret" not in text


def test_the_license_survives_a_cascade_whose_folders_have_moved(tmp_path):
    """Each checkpoint passes on the license of the one before, as it does with the tokenizer."""
    folder = write_tokenizer(tmp_path / "teacher")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: l3\ntags: [a]\n---\n# A\n")
    for name in ("student", "distilled", "next"):
        save_student(tmp_path / name, TEACHER, tokenizer_dir=folder, n_layer=2)
        shutil.rmtree(folder)
        folder = tmp_path / name
    setup(folder, out_dir=tmp_path / "out", check=False)
    metadata = card(tmp_path / "out")[0]
    assert (metadata["license"], metadata["license_name"]) == ("other", "l3")
    assert not (tmp_path / "out/license.yaml").exists()


def test_the_card_of_a_padded_model_has_both_counts(tmp_path):
    save_student(tmp_path / "lit", TEACHER, intermediate_size=[9, 9, 9, 700])
    exported = export_hf(tmp_path / "lit", tmp_path / "out", check=False)
    true = sum(weight.numel() for weight in load_model(tmp_path / "lit").parameters())
    assert f"| parameters | {true:,} ({exported.n_params:,} with zeros" in card(tmp_path / "out")[1]
    assert exported.n_params > true


def test_an_intermediate_checkpoint_has_the_losses_until_then(tmp_path):
    folder = save(tmp_path / "step-00000002", TEACHER)
    (folder / "hyperparameters.yaml").write_text("seed: 1\n")
    rows = [{"step": 2, "iter": 2, "val_loss": 3.25}, {"step": 4, "iter": 4, "val_loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setup(folder, out_dir=tmp_path / "out", check=False)
    assert "3.2500" in card(tmp_path / "out")[1] and "2.5000" not in card(tmp_path / "out")[1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no metadata",
        "---\nlicense: [\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: 3\n---",
        "---\ndate: 2024-02-30\n---",
    ],
)
def test_a_card_leaves_out_what_is_unknown(text, tmp_path):
    folder = save(tmp_path / "lit", dataclasses.replace(TEACHER, hf_config={}))
    (folder / "README.md").write_text(text)
    (folder / "hyperparameters.yaml").write_text(text)
    setup(folder, out_dir=tmp_path / "out", check=False)
    metadata, body = card(tmp_path / "out")
    assert {"license", "base_model"}.isdisjoint(metadata) and "## Measurements" not in body


# -- the Hub


class FakeHub:
    """Records what would be sent to the Hub."""

    calls: list
    fails_in: str | None = None

    def _call(self, name, **arguments):
        if self.fails_in == name:
            raise OSError("no route to host\nmore details")
        self.calls.append((name, arguments))

    def whoami(self):
        self._call("whoami")

    def create_repo(self, repo_id, **options):
        self._call("create_repo", repo_id=repo_id, **options)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, repo_id, folder_path, **_):
        self._call("upload_folder", repo_id=repo_id, files=sorted(path.name for path in folder_path.iterdir()))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeHub, "calls", [], raising=False)
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    return FakeHub


def test_the_folder_is_uploaded(fake, tmp_path, capsys):
    save(tmp_path / "lit", TEACHER)
    CLI(setup, args=[
        str(tmp_path / "lit"), "--out_dir", str(tmp_path / "out"), "--push_to_hub", "me/small", "--private", "true",
        "--check", "false",
    ])  # fmt: skip
    assert fake.calls == [
        ("whoami", {}),
        ("create_repo", {"repo_id": "me/small", "private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/small", "files": ["README.md", "config.json", "model.safetensors"]}),
    ]
    assert "Uploaded to https://huggingface.co/me/small" in capsys.readouterr().out
    assert 'from_pretrained("me/small")' in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("method", "message", "is_exported"),
    [("whoami", "OSError: no route to host.*HF_TOKEN", False), ("upload_folder", "is complete.*hf upload", True)],
)
def test_a_refusal_of_the_hub_is_reported_in_one_line(method, message, is_exported, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "fails_in", method)
    save(tmp_path / "lit", TEACHER)
    with pytest.raises(UserError, match=message) as error:
        setup(tmp_path / "lit", out_dir=tmp_path / "out", push_to_hub="me/small", check=False)
    assert "\n" not in str(error.value) and (tmp_path / "out").exists() == is_exported


def test_invalid_options_of_the_hub_are_rejected_before_it_is_asked(fake, tmp_path):
    for options, message in (
        ({"push_to_hub": "a/b/c"}, "such as 'user/model', got 'a/b/c'"),
        ({"private": True}, "add --push_to_hub"),
    ):
        with pytest.raises(UserError, match=message) as error:
            setup(tmp_path / "nowhere", out_dir=tmp_path / "out", **options)
        assert "\n" not in str(error.value)
    assert not fake.calls


def test_without_a_token_the_hub_asks_for_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="hf auth login") as error:
        setup(tmp_path / "lit", out_dir=tmp_path / "out", push_to_hub="me/small")
    assert "\n" not in str(error.value)
