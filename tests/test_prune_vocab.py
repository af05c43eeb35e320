"""Test pruned vocabularies against the original tokenizers, stock litgpt, and float64 formulas."""

import json
import math
import random
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt import GPT, Config
from litgpt.args import EvalArgs
from litgpt.tokenizer import Tokenizer as LitGPTTokenizer
from test_train import checkpoint, rows, run, train_args
from texts import write_jsonl, write_word_tokenizer
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from litgpt_whittle.batches import BatchArgs, BudgetArgs, fixed_batches
from litgpt_whittle.checkpoint import check_checkpoint
from litgpt_whittle.commands import search_run
from litgpt_whittle.commands.extract import setup as extract
from litgpt_whittle.commands.prune_vocab import setup
from litgpt_whittle.commands.search import setup as search
from litgpt_whittle.data import HFText
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.errors import UserError
from litgpt_whittle.licenses import license_of
from litgpt_whittle.results import SearchResult
from litgpt_whittle.strategies import RandomSearch
from litgpt_whittle.tensors import IGNORE_INDEX
from litgpt_whittle.vocabulary.bpe import BYTES, Bpe, read_bpe
from litgpt_whittle.vocabulary.choose import choose_tokens
from litgpt_whittle.vocabulary.kept import KeptTokens, tokenizer_fingerprint
from litgpt_whittle.vocabulary.rewrite import named_ids, read_json, write_tokenizer
from litgpt_whittle.vocabulary.text_bytes import n_text_bytes, token_bytes

PAGES = [path.read_text() for path in sorted(Path(__file__).parents[1].glob("*.md"))]
LINES = [line for page in PAGES for line in page.splitlines() if len(line) > 20]
KINDS = ("byte-level", "ignoring merges", "SentencePiece")
N_TOKENS, SIZE, SEQ = 900, 576, 16


def byte_level(ignores_merges=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if ignores_merges:  # as in Llama 3
        split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\p{L}\p{N}\s]+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, ["<|end|>", "<|begin|>"], pre_tokenizers.ByteLevel.alphabet())
    tokenizer.post_processor = template("<|begin|>", tokenizer)
    tokenizer.add_tokens(["litgpt search", AddedToken("<<", normalized=False)])  # beyond the model's ids
    content = json.loads(tokenizer.to_str())
    if ignores_merges:
        content["model"] |= {"ignore_merges": True, "merges": every_split(content["model"]["vocab"])}
    return content


def sentencepiece():
    """Return a tokenizer as converters of `transformers` make it from a SentencePiece model."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # in training only: words
    train(tokenizer, ["<unk>", "<|begin|>", "<|end|>", *BYTES], [])
    tokenizer.post_processor = processors.Sequence([template("<|begin|>", tokenizer)])
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = content["added_tokens"][:3]
    content["model"]["merges"] = every_split(content["model"]["vocab"])
    return content


def train(tokenizer, special, alphabet):
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)


def template(token, tokenizer):
    return processors.TemplateProcessing(f"{token} $A", None, [(token, tokenizer.token_to_id(token))])


def every_split(vocab):
    """Return a merge for every way to divide every token in two, as converted tokenizers have them."""
    pairs = [(token[:i], token[i:]) for token in sorted(vocab, key=vocab.get) for i in range(1, len(token))]
    return [[a, b] for a, b in pairs if a in vocab and b in vocab]


MAKE = {"byte-level": byte_level, "ignoring merges": lambda: byte_level(True), "SentencePiece": sentencepiece}


def write_files(folder, kind):
    content = MAKE[kind]()
    ids = content["model"]["vocab"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "added_tokens_decoder": {str(ids[t]): {"content": t, "special": True} for t in ("<|begin|>", "<|end|>")},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    rare = max(ids.values())
    generation = {"eos_token_id": [ids["<|end|>"], rare], "bos_token_id": ids["<|begin|>"], "pad_token_id": 10**6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    hf = {"vocab_size": 1000, "eos_token_id": ids["<|end|>"], "model_type": "llama", "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(hf))
    return content


@dataclass
class Pruned:
    """A tokenizer before and after."""

    old: Tokenizer
    new: Tokenizer
    content: dict
    bpe: Bpe
    kept: np.ndarray
    folder: Path

    @property
    def new_id(self):
        return {token: i for i, token in enumerate(self.kept.tolist())}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Return a function that prunes a kind of tokenizer by the words of the changelog."""

    @cache
    def make(kind):
        source, out = tmp_path_factory.mktemp("old"), tmp_path_factory.mktemp("new")
        content = write_files(source, kind)
        old = Tokenizer.from_file(str(source / "tokenizer.json"))
        n_ids = old.get_vocab_size()
        counts = np.bincount([i for line in LINES[:60] for i in old.encode(line).ids], minlength=n_ids)
        bpe = read_bpe(content, source / "tokenizer.json", n_ids, named_ids(source))
        kept = choose_tokens(bpe, counts, SIZE)
        write_tokenizer(source, out, kept)
        return Pruned(old, Tokenizer.from_file(str(out / "tokenizer.json")), content, bpe, kept, out)

    return make


WORDS = sorted({word for line in LINES for word in line.split()})
TEXTS = st.one_of(
    st.text(),
    st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join),
    st.lists(st.sampled_from([*WORDS, "<|end|>", "<0x41>", "▁", "litgpt search", "<<<", "é", "漢"])).map("".join),
)


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back_as_from_the_old_tokenizer_and_in_its_tokens_where_all_are_kept(kind, pruned):
    each, n_same, n_other = pruned(kind), 0, 0

    @settings(max_examples=200)
    @given(TEXTS)
    def check(text):
        nonlocal n_same, n_other
        before, after = each.old.encode(text).ids, each.new.encode(text).ids
        for skips in (True, False):
            assert each.new.decode(after, skip_special_tokens=skips) == each.old.decode(
                before, skip_special_tokens=skips
            )
        if set(before) <= set(each.new_id):
            assert after == [each.new_id[i] for i in before]
            n_same += 1
        else:
            n_other += 1

    check()
    assert n_same > 20 and n_other > 20


@pytest.mark.parametrize("kind", KINDS)
def test_merges_lead_to_every_kept_token_and_bytes_and_special_tokens_are_kept(kind, pruned):
    each = pruned(kind)
    content = json.loads(each.new.to_str())["model"]

    def reachable(model):
        merging = models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]], byte_fallback=True)
        return {token for token in model["vocab"] if [t.value for t in merging.tokenize(token)] == [token]}

    assert reachable(content) == reachable(each.content["model"]) & content["vocab"].keys()
    assert len(reachable(content)) > SIZE - 300 and sorted(each.new.get_vocab().values()) == list(range(SIZE))
    alphabet = BYTES if kind == "SentencePiece" else pre_tokenizers.ByteLevel.alphabet()
    assert {*alphabet, *(token["content"] for token in each.content["added_tokens"])} <= each.new.get_vocab().keys()
    assert all({a, b, a + b} <= content["vocab"].keys() for a, b in content["merges"])


@pytest.mark.parametrize("kind", KINDS)
def test_files_have_the_new_ids_and_open_in_litgpt_and_transformers(kind, pruned):
    each = pruned(kind)
    end, begin = (each.new.token_to_id(token) for token in ("<|end|>", "<|begin|>"))
    rare = each.new_id[max(each.content["model"]["vocab"].values())]  # kept, because the generation config names it
    generation = read_json(each.folder / "generation_config.json")
    assert generation == {"eos_token_id": [end, rare], "bos_token_id": begin, "pad_token_id": None}
    config = read_json(each.folder / "config.json")
    assert (config["vocab_size"], config["eos_token_id"], config["hidden_size"]) == (SIZE, end, 32)
    decoder = read_json(each.folder / "tokenizer_config.json")["added_tokens_decoder"]
    assert {token["content"]: int(i) for i, token in decoder.items()} == {"<|begin|>": begin, "<|end|>": end}
    ours, theirs = LitGPTTokenizer(each.folder), AutoTokenizer.from_pretrained(each.folder)
    text = LINES[3] + " é"
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (begin, end)
    assert [begin, *ours.encode(text).tolist()] == each.new.encode(text).ids == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_add_up_to_the_bytes_of_a_text(kind, pruned):
    each = pruned(kind)
    sizes = token_bytes(json.loads(each.new.to_str()))
    for text in [*LINES[:50], "Größe 漢字 🙂\n\ttab", "<|end|>"]:
        n_bytes = sizes[each.new.encode(text).ids].sum()
        prepended = 1 if kind == "SentencePiece" and text != "<|end|>" else 0
        assert n_bytes == (0 if text == "<|end|>" else len(text.encode()) + prepended)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_the_cheapest_token_that_no_other_needs_is_removed_first(seed):
    """Against counts that are made from scratch after each removal."""
    rng = random.Random(seed)
    n_base, n = 4, rng.randint(5, 24)
    parts = {i: tuple(rng.choices(range(i), k=rng.choice((2, 2, 3)))) for i in range(n_base, n)}
    required = frozenset(range(n_base)) | set(rng.sample(range(n), 1))
    counts = np.array([rng.choice((0, 0, 1, 2, 9)) for _ in range(n)])
    bpe = Bpe(required, parts)
    size = rng.randint(bpe.smallest, n)

    def occurrences(token, kept, found):
        if token in kept:
            found[token] += 1
        else:
            for part in parts[token]:
                occurrences(part, kept, found)

    kept = set(range(n))
    while len(kept) > size:
        found = [0] * n
        for token, count in enumerate(counts.tolist()):
            for _ in range(count):
                occurrences(token, kept, found)
        used = {part for token in kept if token in parts for part in parts[token]}
        kept.remove(min(kept - used - required, key=lambda token: (found[token] * (len(parts[token]) - 1), -token)))
    assert choose_tokens(bpe, counts, size).tolist() == sorted(kept)


# -- the command


SIZES = dict(
    block_size=SEQ, vocab_size=1000, padded_vocab_size=1024, n_embd=32, n_layer=2, n_head=4, bias=True, name="tiny"
)
SHAPES = {
    "untied": {},
    "tied": {"tied": True},
    "with a bias and a softcap": {"lm_head_bias": True, "final_logit_softcapping": 5.0},
}


def write_teacher(folder, kind="byte-level", tied=False, seed=0, **config):
    checkpoint(folder, seed=seed, **(SIZES | config))
    weights = torch.load(folder / "lit_model.pth")
    if tied:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    if "lm_head.bias" in weights:
        weights["lm_head.bias"].normal_(generator=torch.Generator().manual_seed(1))
    torch.save(weights, folder / "lit_model.pth")
    write_files(folder, kind)
    return folder


@pytest.fixture(scope="module")
def given_dir(tmp_path_factory):
    """Make a teacher and text."""
    folder = tmp_path_factory.mktemp("given")
    write_teacher(folder / "teacher")
    (folder / "teacher/README.md").write_text("---\nlicense: mit\n---\n")
    write_jsonl(folder / "train.jsonl", LINES[:150])
    write_jsonl(folder / "validation.jsonl", LINES[150:180])
    return folder


def text_of(folder):
    return HFText(str(folder / "train.jsonl"), val_path=str(folder / "validation.jsonl"))


def prune(folder, teacher, out_dir, **settings):
    sizes = dict(size=SIZE + 20, data=text_of(folder), train=BatchArgs(2, SEQ), eval=BudgetArgs(2))
    setup(teacher, out_dir, **(sizes | settings))
    return out_dir


@pytest.fixture(scope="module")
def small(given_dir):
    """Prune the teacher's vocabulary."""
    return prune(given_dir, given_dir / "teacher", given_dir / "small")


def test_the_license_is_passed_on(small):
    assert license_of(small) == {"license": "mit"}


def stock(folder):
    """Load a checkpoint as stock litgpt does, in float64."""
    model = GPT(Config.from_checkpoint(folder))
    model.load_state_dict(torch.load(folder / "lit_model.pth"))
    return model.double().eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_the_teachers_at_the_kept_tokens(shape, kind, given_dir, tmp_path):
    teacher = write_teacher(tmp_path / "teacher", kind, **shape)
    out = prune(given_dir, teacher, tmp_path / "out", eval=BudgetArgs(1))
    kept = KeptTokens.read(out)
    assert (
        kept.belong_to(teacher) and check_checkpoint(out).padded_vocab_size == check_checkpoint(out).vocab_size == SIZE
    )
    ids = torch.from_numpy(kept.ids.indices.copy())
    new = LitGPTTokenizer(out).encode(" ".join(WORDS[:40])).long()[None, :SEQ]
    assert torch.equal(stock(out)(new), stock(teacher)(ids[new])[..., ids])
    weights = torch.load(out / "lit_model.pth")
    tied = weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()
    assert tied == bool(shape.get("tied"))


@torch.no_grad()
def test_bits_per_byte_are_those_of_stock_litgpt_on_the_same_text(given_dir, small, tmp_path, capsys):
    prune(given_dir, given_dir / "teacher", tmp_path / "out")
    printed = capsys.readouterr().out
    tokenizer = LitGPTTokenizer(given_dir / "teacher")
    end = tokenizer.eos_id
    encoded = [tokenizer.processor.encode(line, add_special_tokens=False).ids for line in LINES[150:180]]
    stream = [i for ids in encoded for i in [*ids, end]]
    seen = [stream[i : i + SEQ - 1] for i in range(0, 4 * SEQ, SEQ)]  # litgpt_whittle.data.token_file.Windows
    documents = "".join("\0" if i == end else f"{i} " for ids in seen for i in ids).split("\0")
    # a window may begin or end with the end of a document, which depends on the trained tokenizer
    texts = [tokenizer.processor.decode([int(i) for i in ids.split()]) for ids in documents if ids]
    n_bytes = sum(len(text.encode()) for text in texts)
    assert f"On {4 * SEQ} validation tokens, {n_bytes} bytes of text" in printed
    found = []
    for folder in (given_dir / "teacher", small):
        own = LitGPTTokenizer(folder).processor
        ids = [
            i for text in texts for i in [*own.encode(text, add_special_tokens=False).ids, own.token_to_id("<|end|>")]
        ]
        model, nats = stock(folder), 0.0
        for i in range(0, len(ids), SEQ):
            targets = torch.tensor(ids[i : i + SEQ])
            inputs = torch.cat((torch.tensor([own.token_to_id("<|begin|>")]), targets[:-1]))
            nats -= torch.log_softmax(model(inputs[None])[0], -1).gather(1, targets[:, None]).sum().item()
        found.append(nats / math.log(2) / n_bytes)
    (line,) = (line for line in printed.splitlines() if "bits per byte" in line)
    assert [float(part) for part in line.replace("bits per byte", "").split("->")] == pytest.approx(found, abs=1e-3)


def test_searches_and_their_students_are_measured_in_bits_per_byte(given_dir, small, tmp_path, monkeypatch, capsys):
    """The oracle decodes the predicted tokens, whose windows follow one another."""
    monkeypatch.setattr(search_run, "write_report", lambda out_dir: "the report")
    settings = {"train": BatchArgs(2, SEQ), "eval": BudgetArgs(2), "precision": "32-true", "bin": "10K-1M"}
    settings |= {"fitness": "perplexity", "strategy": RandomSearch(), "simple_starts": False, "iterations": 2}
    search(small, data=text_of(given_dir), out_dir=tmp_path / "search", **settings)
    data, tokenizer = text_of(given_dir), LitGPTTokenizer(small)
    data.connect(tokenizer, 2, SEQ)
    data.prepare_data()
    data.setup()
    batches = fixed_batches(data.val_dataloader(), 2, SEQ)
    ids = torch.cat([batch.targets.flatten() for batch in batches]).tolist()
    n_bytes = len(tokenizer.processor.decode(ids, skip_special_tokens=True).encode())
    found = SearchResult(tmp_path / "search")
    for evaluation in found.findings.evaluations:
        bits = evaluation.scores["nll"] * len(ids) / math.log(2) / n_bytes
        assert evaluation.scores["bits_per_byte"] == pytest.approx(bits)
    printed = f"{found.best.scores['bits_per_byte']:.4f}"
    assert found.findings.bests[0][2] == "bits per byte" and found.findings.bests[1][2] == printed
    extract(small, tmp_path / "search", tmp_path / "students")
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == printed


def test_bytes_of_text_are_unknown_without_a_bpe(small, tmp_path):
    ids = [torch.tensor([3, IGNORE_INDEX])]
    assert n_text_bytes(small, ids) == int(token_bytes(read_json(small / "tokenizer.json"))[3])
    assert n_text_bytes(tmp_path, ids) is None
    assert n_text_bytes(write_word_tokenizer(tmp_path / "words", 9), ids) is None
    assert n_text_bytes(small, [torch.tensor([SIZE + 1000])]) is None


@torch.no_grad()
def test_students_distill_from_the_teachers_probabilities_renormalised_over_kept_tokens(given_dir, small, tmp_path):
    (tmp_path / "cut.yaml").write_text("n_layer: 1\nintermediate_size: 64\n")
    extract(small, tmp_path / "cut.yaml", tmp_path / "student")
    with torch.enable_grad():
        run(
            tmp_path / "out",
            initial_checkpoint_dir=tmp_path / "student",
            teacher_checkpoint_dir=small,
            data=text_of(given_dir),
            train=train_args(max_tokens=None, max_steps=2, max_seq_length=SEQ),
            eval=EvalArgs(interval=2, max_iters=2),
            distill=DistillArgs(alpha=0.0, beta=1.0, temperature=0.9),
        )
    data, tokenizer = text_of(given_dir), LitGPTTokenizer(small)
    data.connect(tokenizer, 4, SEQ)
    data.setup()
    batches = iter(data.train_dataloader())
    ids = torch.cat([next(batches), next(batches)])[:, :-1]
    kept = torch.from_numpy(KeptTokens.read(tmp_path / "out/final").ids.indices.copy())
    probabilities = torch.softmax(stock(given_dir / "teacher")(kept[ids]) / 0.9, -1)[..., kept]
    probabilities /= probabilities.sum(-1, keepdim=True)
    log_q = torch.log_softmax(stock(tmp_path / "student")(ids) / 0.9, -1)
    expected = (probabilities * (probabilities.log() - log_q)).sum(-1).mean().item()
    assert rows(tmp_path / "out")[0]["distill"] == pytest.approx(expected, abs=1e-5)

    targets = torch.cat([batch for _, batch in zip(range(2), data.val_dataloader())])[:, 1:].flatten().tolist()
    n_bytes = sum(len(tokenizer.processor.decode([i]).encode()) for i in targets if i != tokenizer.eos_id)
    for name in ("val", "teacher_val"):
        row = rows(tmp_path / "out", f"{name}_loss")[-1]
        bits = row[f"{name}_loss"] / math.log(2) * len(targets) / n_bytes
        assert row[f"{name}_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_another_teacher_gets_the_same_tokens(given_dir, small, tmp_path):
    larger = write_teacher(tmp_path / "larger", seed=1, n_embd=48)
    content = read_json(larger / "tokenizer.json")
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # as old files have them
    (larger / "tokenizer.json").write_text(json.dumps(content))
    setup(larger, tmp_path / "out", like=small)
    assert KeptTokens.read(tmp_path / "out").ids == KeptTokens.read(small).ids
    assert tokenizer_fingerprint(read_json(tmp_path / "out/tokenizer.json")) == tokenizer_fingerprint(
        read_json(small / "tokenizer.json")
    )
    kept = KeptTokens.read(small).ids.indices.copy()
    weights = [torch.load(folder / "lit_model.pth")["lm_head.weight"] for folder in (larger, tmp_path / "out")]
    assert torch.equal(weights[0][kept], weights[1])


def no_bpe(folder, text, small):
    write_word_tokenizer(folder, 100)


def suffix(folder, text, small):
    content = read_json(folder / "tokenizer.json")
    content["model"]["end_of_word_suffix"] = "</w>"
    (folder / "tokenizer.json").write_text(json.dumps(content))


def no_tokenizer(folder, text, small):
    (folder / "tokenizer.json").unlink()


def other_merges(folder, text, small):
    content = read_json(folder / "tokenizer.json")
    content["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(content))


def layerwise(folder, text, small):
    (folder / "model_class.yaml").write_text("model_class: LayerwiseGPT\n")


def few_rows(folder, text, small):
    shutil.rmtree(folder)
    write_teacher(folder, vocab_size=512, padded_vocab_size=512)


FAULTS = [
    (no_bpe, {}, "only vocabularies of BPE tokenizers can be pruned, '.*tokenizer.json' is a WordLevel model"),
    (suffix, {}, "has end_of_word_suffix = '</w>'"),
    (
        no_tokenizer,
        {"data": None, "size": None, "like": "small"},
        "of another tokenizer than that of '.*teacher'; choose",
    ),
    (other_merges, {"size": None, "like": "small"}, "of another tokenizer than that of '.*teacher'; choose"),
    (few_rows, {"size": None, "data": None, "like": "small"}, "every kept token needs an embedding, .* has 512 rows"),
    (few_rows, {}, "every token needs an embedding, and .* where the checkpoint has 512 rows"),
    (layerwise, {}, "must be pruned before layers differ in size"),
    (None, {"size": 200}, "size must be from 320 .* to 896 .*, got 200"),
    (None, {"size": "1k"}, "size must be from 320 .* to 896 .*, got 1000"),
    (None, {"size": "much"}, "an amount in"),
    (None, {"size": None}, "exactly one of size and like must be set"),
    (None, {"like": "small"}, "exactly one of size and like must be set"),
    (None, {"data": None}, "choosing tokens needs text"),
    (None, {"size": None, "like": "teacher"}, "like must name a checkpoint of litgpt prune_vocab"),
    (None, {"tokens": 0}, "tokens must be at least 1"),
    (None, {"train": BatchArgs(1, 99)}, "train.max_seq_length must be at most"),
]


@pytest.mark.parametrize("fault, settings, message", FAULTS)
def test_invalid_input_is_refused_before_anything_is_written(fault, settings, message, given_dir, small, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(given_dir / "teacher", teacher)
    if fault is not None:
        fault(teacher, given_dir, small)
    if "like" in settings:
        settings = settings | {"like": {"small": small, "teacher": given_dir / "teacher"}[settings["like"]]}
    with pytest.raises(UserError, match=message) as error:
        prune(given_dir, teacher, tmp_path / "out", **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_teacher_whose_vocabulary_is_whole_is_refused_with_the_command_that_prunes_it(given_dir, small, tmp_path):
    settings = {"initial_checkpoint_dir": small, "data": text_of(given_dir), "distill": DistillArgs()}
    with pytest.raises(UserError, match="differ, first in .*run 'litgpt prune_vocab .*/teacher --like .*/small'"):
        run(tmp_path / "out", teacher_checkpoint_dir=given_dir / "teacher", **settings)
    shutil.copytree(given_dir / "teacher", tmp_path / "other")
    other_merges(tmp_path / "other", given_dir, small)
    with pytest.raises(UserError, match="choose a teacher with the student's tokenizer"):
        run(tmp_path / "out", teacher_checkpoint_dir=tmp_path / "other", **settings)
    assert not (tmp_path / "out").exists()
