"""Test run settings as YAML: read back by the command line, and identical in the next process."""

import enum
import json
import random
import re
import shutil
from pathlib import Path

import litgpt.data
import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from litgpt.data import DataModule
from litgpt.prompts import ChatML, PromptStyle, Qwen2_5, prompt_styles
from litgpt.utils import CLI
from test_train import checkpoint, same, train_args
from texts import documents, write_tokenizer

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.commands.cache_teacher import WindowArgs
from litgpt_whittle.commands.cache_teacher import setup as cache_teacher
from litgpt_whittle.commands.distill import setup as distill
from litgpt_whittle.data import HFText
from litgpt_whittle.settings import describe

MODULES = [name for name in litgpt.data.__all__ if name not in ("DataModule", "SFTDataset", "get_sft_collate_fn")]
MODULES.remove("LIMA")  # requires an access token, which is not written


@pytest.fixture
def records(tmp_path):
    """Write instructions in the format of litgpt's JSON module."""
    rng = random.Random(0)
    texts = documents(24)
    rows = [{"instruction": rng.choice(texts), "output": text} for text in texts]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(rows))
    return path


def read_back(described):
    """Return the data module that jsonargparse makes from its description in a YAML file."""
    parser = ArgumentParser()
    parser.add_argument("--data", type=DataModule)
    text = yaml.safe_dump({"data": described})
    assert not re.search(r"0x[0-9a-f]{6}", text), text
    return parser.instantiate_classes(parser.parse_string(text)).data


def assert_comes_back(module):
    described = describe(module)
    again = read_back(described)
    assert type(again) is type(module)
    assert describe(again) == described


@pytest.mark.parametrize("name", [*MODULES, "HFText"])
def test_every_data_module_comes_back_from_its_description(name, records):
    cls = HFText if name == "HFText" else getattr(litgpt.data, name)
    given = {"JSON": {"json_path": records}, "TextFiles": {"train_data_path": records.parent}, "HFText": {"path": "x"}}
    assert_comes_back(cls(**given.get(name, {})))


@pytest.mark.parametrize("style", [*prompt_styles.values(), lambda: ChatML("Be brief.")])
def test_every_prompt_style_comes_back_with_its_settings(style, records):
    module = litgpt.data.JSON(records, val_split_fraction=0.5, prompt_style=style())
    assert_comes_back(module)
    again = read_back(describe(module)).prompt_style
    kwargs = {"sys_prompt": None, "input": "", "targets": ""}
    assert again.apply("the fox", **kwargs) == module.prompt_style.apply("the fox", **kwargs)


def test_prompt_styles_with_other_settings_differ(records):
    described = [
        describe(litgpt.data.JSON(records, val_split_fraction=0.5, prompt_style=style))
        for style in (ChatML("a"), ChatML("b"), ChatML(), Qwen2_5(), "alpaca")
    ]
    assert len(set(map(str, described))) == 5


def test_an_access_token_is_not_written():
    described = describe(litgpt.data.LIMA(access_token="hf_secret"))
    assert "hf_secret" not in str(described) and "repo_id" in described["init_args"]


class _Colour(enum.Enum):
    RED = 1


class _Sized(PromptStyle):
    def __init__(self, size: int, *rest: int, unknown: int = 3) -> None:
        self.size = size


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (Path("a/b"), "a/b"),
        (torch.bfloat16, "torch.bfloat16"),
        (_Colour.RED, "RED"),
        (np.float32(0.5), 0.5),
        ({2, 1}, [1, 2]),
        ((1, (2, None)), [1, [2, None]]),
        (json.dumps, "json.dumps"),
        (torch.optim.AdamW, "torch.optim.adamw.AdamW"),
        (_Sized(2), {"class_path": f"{__name__}._Sized", "init_args": {"size": 2}}),
        (object(), {"class_path": "builtins.object", "init_args": {}}),
    ],
)
def test_any_value_is_described_without_its_address(value, described):
    assert describe(value) == described
    assert yaml.safe_load(yaml.safe_dump(describe(value))) == described


def instructions(records):
    return litgpt.data.JSON(records, val_split_fraction=0.25, num_workers=0, prompt_style=ChatML("Be brief."))


@pytest.fixture
def teacher(tmp_path):
    folder = checkpoint(tmp_path / "teacher", seed=1, vocab_size=300, padded_vocab_size=300, block_size=128)
    return write_tokenizer(folder)


@pytest.mark.slow
def test_a_run_on_instructions_goes_on_and_is_repeated_from_its_hyperparameters(
    records, teacher, tmp_path, monkeypatch
):
    """The oracle is the uninterrupted run."""

    def run(out_dir, **kwargs):
        options = dict(initial_checkpoint_dir=teacher, teacher_checkpoint_dir=teacher, data=instructions(records))
        options |= dict(compile=False, precision="32-true", logger_name="csv", devices=1, out_dir=out_dir)
        distill(train=train_args(max_tokens=4 * 8 * 128, save_interval=2), **(options | kwargs))
        return load_model(out_dir / "final").state_dict()

    unbroken, broken = run(tmp_path / "unbroken"), tmp_path / "broken"
    shutil.copytree(tmp_path / "unbroken/step-00000002", broken / "step-00000002")
    assert same(run(broken, resume="auto"), unbroken)
    config = tmp_path / "unbroken/final/hyperparameters.yaml"
    CLI(distill, args=["--config", str(config), "--out_dir", str(tmp_path / "again")])
    assert same(load_model(tmp_path / "again/final").state_dict(), unbroken)


def test_a_cache_of_instructions_goes_on(records, teacher, tmp_path):
    out_dir = tmp_path / "cache"

    def run(**kwargs):
        cache_teacher(
            teacher, instructions(records), out_dir, "full", train=WindowArgs(4, 128), shard_size="1KB", **kwargs
        )
        return {path.name: path.read_bytes() for path in out_dir.iterdir()}

    whole = run()
    index = json.loads(whole["index.json"])
    assert len(index["shards"]) > 2
    last = f"shard-{len(index['shards']) - 1:05d}.bin"
    (out_dir / "index.json").write_text(json.dumps(index | {"shards": index["shards"][:-1]}))
    (out_dir / last).unlink()
    assert run(resume=True) == whole
