"""Test conversations: rendered as transformers renders them, with the loss on the assistant's answers only."""

import copy
import json
import random
import shutil
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.tokenizer import Tokenizer
from texts import documents, write_jsonl, write_tokenizer
from tokenizers import Tokenizer as Processor
from transformers import PreTrainedTokenizerFast

from litgpt_whittle.data import HFText
from litgpt_whittle.data.chat import ChatTemplate, encode_chats, find_template
from litgpt_whittle.data.loading import split_batch
from litgpt_whittle.data.token_file import COUNTS
from litgpt_whittle.errors import UserError
from litgpt_whittle.tensors import IGNORE_INDEX
from litgpt_whittle.training.data_stream import DataStream

LENGTH = 16
START, END = "<|im_start|>", "<|im_end|>"

# SmolLM2's template, with and without marks
OPEN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
)
CLOSE = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = OPEN + "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}" + CLOSE
MARKED = (
    OPEN + "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}" + CLOSE
)


def write_chat_tokenizer(folder: Path, template: str | None = CHATML) -> Path:
    """Write a tokenizer with the special tokens of ChatML, and a chat template."""
    write_tokenizer(folder)
    processor = Processor.from_file(str(folder / "tokenizer.json"))
    processor.add_special_tokens([START, END])
    processor.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def chats(n: int, seed: int = 0) -> list[list[dict]]:
    """Return made-up conversations of one to three turns, some with a system prompt."""
    rng, texts = random.Random(seed), iter(documents(10 * n, seed))
    found = []
    for _ in range(n):
        messages = [{"role": "system", "content": next(texts)}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 3)):
            messages += [{"role": role, "content": next(texts)} for role in ("user", "assistant")]
        found.append(messages)
    return found


def write_chats(path: Path, conversations: list[list[dict]], column: str = "messages") -> Path:
    path.write_text("".join(json.dumps({column: messages}) + "\n" for messages in conversations))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


def opened(folder, path, length=LENGTH, **options) -> HFText:
    data = HFText(path if isinstance(path, dict) else str(path), **options)
    data.tokenizer_dir = folder
    data.connect(Tokenizer(folder), 2, length)
    data.check(reads=True)
    data.prepare_data()
    data.setup()
    return data


def string_oracle(tokenizer, messages) -> tuple[list[int], list[bool]]:
    """Return ids and mask of ChatML, part by part: no token crosses a special token or the line break after a role."""
    text, is_answer = "", []
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "Be brief."}, *messages]
    for message in messages:
        head, body = f"{START}{message['role']}\n", f"{message['content']}{END}\n"
        text += head + body
        is_answer += [False] * len(head) + [message["role"] == "assistant"] * len(body)
    encoding = tokenizer.processor.encode(text, add_special_tokens=False)
    return encoding.ids, [any(is_answer[start:end]) for start, end in encoding.offsets]


def test_answers_are_those_of_string_offsets(folder, tokenizer):
    conversations = chats(30)
    found = encode_chats(tokenizer, find_template(None, folder, tokenizer), conversations, "x", True)
    for messages, document in zip(conversations, found, strict=True):
        ids, mask = string_oracle(tokenizer, messages)
        assert document.ids == ids and document.counts == mask
        assert any(mask) and not all(mask)


WORDS = st.text(st.sampled_from("abc é≠😀\n <|im_end|>"), max_size=12)


@pytest.fixture(scope="module")
def theirs(folder):
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=MARKED)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.booleans())
def test_marked_answers_are_those_of_transformers(tokenizer, theirs, turns, has_system):
    messages = [{"role": "system", "content": "so"}] if has_system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (document,) = encode_chats(tokenizer, ChatTemplate(MARKED, {}), [messages], "x", True)
    oracle = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert document.ids == oracle["input_ids"]
    assert [int(counts) for counts in document.counts] == oracle["assistant_masks"]
    (plain,) = encode_chats(tokenizer, ChatTemplate(MARKED, {}), [messages], "x", False)
    assert plain.ids == document.ids and plain.counts is None


def stream_oracle(tokenizer, conversations) -> tuple[list[int], list[int]]:
    """Return ids and labels of conversations, one after the other."""
    found = [string_oracle(tokenizer, each) for each in conversations]
    ids, mask = (list(chain.from_iterable(parts)) for parts in zip(*found))
    return ids, [i if counts else IGNORE_INDEX for i, counts in zip(ids, mask)]


@pytest.mark.parametrize("bos", [False, True])
def test_blocks_are_the_conversations_one_after_the_other_and_only_answers_have_targets(folder, tmp_path, bos):
    tokenizer = Tokenizer(write_chat_tokenizer(tmp_path / "teacher"))
    tokenizer.bos_id = tokenizer.eos_id if bos else None
    held_out = write_chats(tmp_path / "val.jsonl", chats(9, seed=1))
    data = HFText(str(write_chats(tmp_path / "chat.jsonl", chats(20))), val_path=str(held_out), bos=bos)
    data.tokenizer_dir = folder
    data.connect(tokenizer, 2, LENGTH)
    data.prepare_data(), data.setup()
    for dataset, conversations in ((data.train_dataset, chats(20)), (data.val_dataset, chats(9, seed=1))):
        ids, labels = stream_oracle(tokenizer, conversations)
        assert dataset.about["n_documents"] == len(conversations) and dataset.about["n_tokens"] == len(ids)
        assert len(dataset) == (len(ids) - (not bos)) // LENGTH
        for i, window in enumerate(dataset):
            first = i * LENGTH - bos
            assert window["input_ids"][bos:].tolist() == ids[first + bos : first + LENGTH + 1]
            assert window["labels"][bos:].tolist() == labels[first + bos : first + LENGTH + 1]
            assert not bos or (window["input_ids"][0] == tokenizer.bos_id and window["labels"][0] == IGNORE_INDEX)
    inputs, targets = split_batch(next(iter(data.val_dataloader())), LENGTH)
    assert inputs.shape == targets.shape == (2, LENGTH)


def test_all_tokens_count_if_asked_for(folder, tmp_path):
    path = write_chats(tmp_path / "chat.jsonl", chats(20))
    answers, whole = (opened(folder, path, answers_only=only, val_fraction=0.3) for only in (True, False))
    assert isinstance(whole.train_dataset[0], torch.Tensor)
    assert [window.tolist() for window in whole.train_dataset] == [
        window["input_ids"].tolist() for window in answers.train_dataset
    ]
    assert not (whole.train_dataset.folder / COUNTS).exists() and (answers.train_dataset.folder / COUNTS).exists()


def test_other_forms_of_conversations_give_the_same_tokens(folder, tmp_path):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    renamed = [[{"from": names[m["role"]], "value": m["content"]} for m in messages] for messages in chats(20)]
    with_none = [[m | {"tool_calls": None} for m in messages] for messages in chats(20)]
    expected = opened(folder, write_chats(tmp_path / "chat.jsonl", chats(20)), val_fraction=0.3)
    for name, conversations in (("messages", with_none), ("conversations", renamed)):
        path = write_chats(tmp_path / f"other_{name}.jsonl", conversations, name)
        found = opened(folder, path, val_fraction=0.3, messages_column=name)
        for part in ("train_dataset", "val_dataset"):
            assert [w["labels"].tolist() for w in getattr(found, part)] == [
                w["labels"].tolist() for w in getattr(expected, part)
            ]


def test_blends_mix_conversations_and_text(folder, tokenizer, tmp_path):
    chat = write_chats(tmp_path / "chat.jsonl", chats(60))
    text = write_jsonl(tmp_path / "text.jsonl", documents(200, seed=3))
    before = opened(folder, text).train_dataset
    kept = {path: path.read_bytes() for path in before.folder.iterdir()}
    data = opened(folder, {str(chat): 0.3, str(text): 0.7})
    rows = [window for batch in data.train_dataloader() for window in zip(batch["input_ids"], batch["labels"])]
    texts = {tuple(window.tolist()) for window in before}
    plain = [tuple(ids.tolist()) in texts for ids, _ in rows]
    assert abs(sum(plain) / len(rows) - 0.7) < 0.02
    own = {tuple(w["input_ids"].tolist()): w["labels"] for w in opened(folder, chat).train_dataset}
    for (ids, labels), is_text in zip(rows, plain):
        assert torch.equal(labels, ids if is_text else own[tuple(ids.tolist())])
    # the text's tokens are those of text alone, which is read as tensors
    assert {path: path.read_bytes() for path in before.folder.iterdir()} == kept
    assert {path.name for path in kept} == {"tokens.bin", "about.json"}
    again = opened(folder, text).train_dataset
    assert again.folder == before.folder and torch.equal(again[0], before[0])

    def stream():
        return DataStream(opened(folder, {str(chat): 0.3, str(text): 0.7}).train_dataloader())

    whole, part, resumed = stream(), stream(), stream()
    expected = [batch["labels"] for batch in islice(whole, 30)]
    list(islice(part, 20))
    resumed.load_state_dict(copy.deepcopy(part.state_dict()))
    assert all(torch.equal(next(resumed)["labels"], labels) for labels in expected[20:])


def test_conversations_are_rendered_again_if_the_template_changes(folder, tmp_path):
    path = write_chats(tmp_path / "chat.jsonl", chats(20))
    first = opened(folder, path).train_dataset
    (tmp_path / "other.jinja").write_text(MARKED)
    marked = opened(folder, path, chat_template=str(tmp_path / "other.jinja")).train_dataset
    # the same text; the line break after an answer counts only without marks
    assert [w["input_ids"].tolist() for w in first] == [w["input_ids"].tolist() for w in marked]
    ignored = [sum((w["labels"] == IGNORE_INDEX).sum() for w in dataset) for dataset in (first, marked)]
    assert ignored[0] < ignored[1]
    capped = opened(folder, path, max_tokens=100).train_dataset
    assert capped.about["n_tokens"] == 100 and (capped.folder / COUNTS).stat().st_size == 100


def test_templates_are_found_where_transformers_finds_them(tmp_path):
    folder = write_chat_tokenizer(tmp_path, None)
    tokenizer = Tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "<|endoftext|>", "__type": "AddedToken"}
    assert find_template(None, folder, tokenizer) is None

    def write(template) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))

    write("in the config")
    assert find_template(None, folder, tokenizer) == ChatTemplate("in the config", {"eos_token": "<|endoftext|>"})
    write([{"name": "default", "template": "first"}, {"name": "tools", "template": "second"}])
    assert find_template(None, folder, tokenizer).source == "first"
    assert find_template("tools", folder, tokenizer).source == "second"
    (folder / "chat_template.jinja").write_text("a file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("a named file")
    assert find_template(None, folder, tokenizer).source == "a file"
    assert find_template("rag", folder, tokenizer).source == "a named file"
    theirs = PreTrainedTokenizerFast.from_pretrained(folder).chat_template
    assert {name: find_template(name, folder, tokenizer).source for name in theirs} == theirs
    # stock litgpt does not tell where the checkpoint is
    path = str(folder / "chat_template.jinja")
    assert find_template(path, None, tokenizer) == ChatTemplate("a file", {"eos_token": "<|endoftext|>"})
    with pytest.raises(UserError, match=r"must be a file, or the name of one of the checkpoint's \(.*rag.*\), got 'x'"):
        find_template("x", folder, tokenizer)


def test_rendered_dates_do_not_depend_on_the_day():
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}).render([], "x") == "26 Jul 2024"


FORGETFUL = "{% for m in messages %}{{ m.role if loop.last else m.role[:1] }}{{ m.content }}{% endfor %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('No system prompts') }}{% endif %}"
SYSTEM = [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("conversations", "template", "problem"),
    [
        (
            chats(5),
            None,
            "the conversations in .*need a chat template, and the checkpoint has none; set data.chat_temp",
        ),
        (chats(5), FORGETFUL, "the chat template must render the first messages of a conversation in .* alike when"),
        ([SYSTEM], STRICT, "with messages of the roles system, assistant .No system prompts.; mend the data, or set"),
        ([SYSTEM], "{% if %}", "the chat template cannot render a conversation"),
        ([[{"role": "user"}]], CHATML, "must have the texts 'role' and 'content', or 'from' and 'value', got 'role'"),
        ([[{"role": "user", "content": [{"type": "text"}]}]], CHATML, "must have the texts 'role' and 'content'"),
        ([{"role": "user"}], CHATML, "must have the texts 'role' and 'content'"),
        ([7], CHATML, "must have the texts 'role' and 'content'.* got neither"),
        ([[]], CHATML, "is empty; choose data that contains text"),
    ],
)
def test_invalid_conversations_are_refused_before_anything_starts(tmp_path, conversations, template, problem):
    folder = write_chat_tokenizer(tmp_path / "teacher", template)
    path = write_chats(tmp_path / "chat.jsonl", conversations)
    with pytest.raises(UserError, match=problem) as error:
        opened(folder, path)
    assert "\n" not in str(error.value) and not (tmp_path / ".tokens").exists()


def test_an_unclear_template_can_be_read_whole(tmp_path):
    folder = write_chat_tokenizer(tmp_path / "teacher", FORGETFUL)
    path = write_chats(tmp_path / "chat.jsonl", chats(20))
    assert len(opened(folder, path, answers_only=False).train_dataset)


def test_a_column_of_text_with_the_name_of_conversations_is_text(folder, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text, "messages": "no"}) + "\n" for text in documents(40)))
    assert isinstance(opened(folder, path).train_dataset[0], torch.Tensor)


def test_another_column_of_messages_is_read_from_a_file_that_was_read_as_text(folder, tmp_path):
    path = tmp_path / "both.jsonl"
    rows = [{"text": text, "conversations": messages} for text, messages in zip(documents(40), chats(40))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert isinstance(opened(folder, path).train_dataset[0], torch.Tensor)
    assert isinstance(opened(folder, path, messages_column="conversations").train_dataset[0], dict)
    assert isinstance(opened(folder, path, messages_column="none").train_dataset[0], torch.Tensor)


def test_a_crash_leaves_no_tokens_without_their_mask(folder, tmp_path, monkeypatch):
    path = write_chats(tmp_path / "chat.jsonl", [*chats(80), [{"role": "user"}]])
    for _ in range(2):
        with pytest.raises(UserError, match="must have the texts"):
            opened(folder, path)
        assert not list((tmp_path / ".tokens").glob("train-*"))
    shutil.rmtree(tmp_path / ".tokens")
