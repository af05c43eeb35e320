"""Test the language-model surrogate, with a tiny model made from a config."""

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from scipy.stats import kendalltau
from test_surrogate import LARGER, TEACHER, loss, sample, write_search
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

from litgpt_whittle.errors import UserError
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.surrogates.surrogate import Examples, Surrogate
from litgpt_whittle.surrogates.text import Text, describe
from litgpt_whittle.testing.surrogates import CHECKS

WORDS = ["[PAD]", "[UNK]", "width", "head", "heads", "neurons", "|", "-", *map(str, range(101))]


def make_model(folder: Path, context: int = 64) -> Path:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=context, num_labels=1, **sizes)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def args(model: Path, **changes) -> SurrogateArgs:
    settings = dict(mode="filter", kind="text", model=str(model), epochs=20, learning_rate=3e-3)
    return SurrogateArgs(**(settings | changes))


def test_descriptions_are_in_percent_of_each_layer():
    subnet = SubNet(TEACHER, n_embd=19, n_layer="0,2-3", n_query_groups=[1, 4, 2], intermediate_size=[16, 25, 64])
    expected = "width 59 head 100 | heads 25 neurons 25 | - | heads 100 neurons 39 | heads 50 neurons 100 | - | -"
    assert describe(TEACHER, [subnet, subnet.to_dict()]) == [expected] * 2
    twice = dict(n_embd=28, n_query_groups=[2, 8, 4], intermediate_size=[20, 31, 80])
    assert (
        describe(LARGER, [SubNet(LARGER, n_layer="0,2-3", **twice)])[0].split(" | ")[1:5] == expected.split(" | ")[1:5]
    )


def test_groups_and_experts_are_named_where_there_are_such():
    llama, mixtral = ARCHITECTURES["Llama-3.1-8B"], ARCHITECTURES["Mixtral-8x7B-v0.1"]
    subnet = SubNet(llama, n_layer="1-1", n_query_groups=1)
    assert describe(llama, [subnet]) == ["width 100 head 100 | - | heads 50 groups 50 neurons 100 | - | -"]
    subnet = SubNet(mixtral, n_layer="3-3", n_expert="1,3")
    assert describe(mixtral, [subnet])[0].endswith("| heads 100 groups 100 neurons 100 experts 50")


def test_a_fine_tuned_model_ranks_what_it_has_not_seen(model):
    known, unknown = sample(TEACHER, 120), sample(TEACHER, 60, seed=1)
    surrogate = Surrogate(lambda: Text(args(model)), TEACHER)
    surrogate.fit(known, [loss(subnet) for subnet in known])
    assert kendalltau(surrogate.predict(unknown), [loss(subnet) for subnet in unknown]).statistic > 0.4


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_language_model_keeps_the_rules(model, check):
    check(lambda: Text(args(model, epochs=2)))


def test_fine_tuning_depends_on_the_seed_and_leaves_pytorchs_settings(model):
    read = describe(TEACHER, sample(TEACHER, 20))
    one, other = Text(args(model, epochs=2)), Text(args(model, epochs=2))
    for text, seed in ((one, 1), (other, 2)):
        text.fit(read, np.random.default_rng(0).normal(size=20), seed)
    assert not torch.are_deterministic_algorithms_enabled()
    assert (one.predict(read) != other.predict(read)).any()


def test_a_saved_surrogate_is_a_model_to_name(model, tmp_path):
    read = describe(TEACHER, sample(TEACHER, 20))
    text = Text(args(model, epochs=3))
    text.fit(read, np.linspace(-1, 1, 20), seed=0)
    assert text.save(tmp_path / "surrogate")
    files = {path.suffix for path in (tmp_path / "surrogate").iterdir()}
    assert ".safetensors" in files and files <= {".safetensors", ".json", ".txt"}
    again = Text(args(tmp_path / "surrogate"))
    assert again.predict(read) == pytest.approx(text.predict(read))


def test_it_learns_from_another_search_too(model, tmp_path):
    examples = Examples.read(write_search(tmp_path / "other", sample(TEACHER, 120, seed=5)))
    surrogate = Surrogate(lambda: Text(args(model)), TEACHER, examples=examples)
    unknown = sample(TEACHER, 60, seed=1)
    assert kendalltau(surrogate.predict(unknown), [loss(subnet) for subnet in unknown]).statistic > 0.4


def test_descriptions_longer_than_a_models_context_are_refused(tmp_path):
    text = Text(args(make_model(tmp_path / "short", context=16)))
    with pytest.raises(
        UserError, match="has a context of 16 tokens, a description .* needs .*; choose a model with a long"
    ):
        text.fit(describe(TEACHER, sample(TEACHER, 4)), np.zeros(4), seed=0)


@pytest.mark.parametrize("content", [None, {"config.json": "{}"}, {"config.json": "text"}])
def test_what_is_no_model_is_refused_in_one_line(tmp_path, monkeypatch, content):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match="surrogate.model '.*' cannot be loaded for sequence classification") as error:
        Text(args(folder))
    assert "\n" not in str(error.value)


def test_weights_in_pickles_are_not_loaded(model, tmp_path):
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(AutoModelForSequenceClassification.from_pretrained(model).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        Text(args(tmp_path))


def test_a_model_must_be_named():
    with pytest.raises(UserError, match="surrogate.kind text needs --surrogate.model"):
        Text(SurrogateArgs(mode="filter", kind="text"))
