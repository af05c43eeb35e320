"""Test blends of texts: shares, order, resuming, and errors."""

import copy
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from texts import documents, write_jsonl, write_tokenizer

from litgpt_whittle.data import HFText
from litgpt_whittle.data.blend import Blended, blended_once, epoch_counts, interleaved, weighted
from litgpt_whittle.errors import UserError
from litgpt_whittle.settings import describe
from litgpt_whittle.training.data_stream import DataStream

LENGTH = 16
BLENDS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4)


def split(blend) -> tuple[list[int], list[Fraction]]:
    total = sum(weight for _, weight in blend)
    return [size for size, _ in blend], [Fraction(weight, total) for _, weight in blend]


@given(BLENDS, st.integers(0, 3))
def test_an_epoch_passes_every_text_in_its_share(blend, epoch):
    sizes, shares = split(blend)
    sampler = Blended(sizes, shares, seed=1)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler)
    seen, first = Counter(order), 0
    for size, share in zip(sizes, shares):
        times = [seen[first + i] for i in range(size)]
        assert min(times) >= 1 and max(times) - min(times) <= 1  # shuffled passes, the last one partial
        assert abs(sum(times) - share * len(order)) <= len(sizes)
        first += size
    assert max(seen) < first


@given(BLENDS, st.booleans())
def test_the_first_windows_have_the_shares_of_all(blend, is_drawn):
    sizes, shares = split(blend)
    counts = epoch_counts(sizes, shares)
    order = interleaved(counts, np.random.default_rng(0) if is_drawn else None)
    for text, count in enumerate(counts):
        among_first = np.cumsum(order == text)
        expected = np.arange(1, len(order) + 1) * count / len(order)
        assert np.abs(among_first - expected).max() <= len(counts)
        assert among_first[-1] == count


@given(BLENDS)
def test_validation_takes_no_window_twice_and_as_many_as_the_shares_allow(blend):
    sizes, shares = split(blend)
    order = blended_once(sizes, shares)
    assert len(set(order)) == len(order)
    bounds = np.cumsum([0, *sizes])
    counts = np.histogram(order, bounds)[0]
    total = min(size / share for size, share in zip(sizes, shares))
    assert all(count == max(int(total * share), 1) for count, share in zip(counts, shares))
    for text in range(len(sizes)):
        own = [i for i in order if bounds[text] <= i < bounds[text + 1]]
        assert own == sorted(own)  # in text order


def test_shares_of_a_million_tokens_are_met_within_one_per_cent():
    sizes, weights = [30_000, 700, 5_000], {"web": 0.6, "code": 0.3, "books": 0.1}
    sampler = Blended(sizes, list(weighted(weights, "data.path").values()), seed=0)
    order = np.asarray(list(sampler))[: 1_000_000 // 512]
    counts = np.histogram(order, np.cumsum([0, *sizes]))[0]
    np.testing.assert_allclose(counts / len(order), list(weights.values()), atol=0.01 * 0.1)


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer(write_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def texts(tmp_path):
    """Write two files whose documents begin with distinct words."""
    paths = []
    for seed, word in enumerate(("alpha", "omega")):
        lines = [f"{word} {text}" for text in documents(60, seed=seed)]
        paths.append(str(write_jsonl(tmp_path / f"{word}.jsonl", lines)))
    return paths


def opened(tokenizer, path, **options) -> HFText:
    data = HFText(path, **({"val_fraction": 0.2} | options))
    data.connect(tokenizer, 2, LENGTH)
    data.check(reads=True)
    data.prepare_data()
    data.setup()
    return data


def test_a_blend_has_the_tokens_of_its_files(tokenizer, texts):
    alone = [opened(tokenizer, path) for path in texts]
    blend = opened(tokenizer, dict(zip(texts, (3, 1))))
    for name in ("train_dataset", "val_dataset"):
        windows = [{tuple(window.tolist()) for window in getattr(each, name)} for each in alone]
        got = [tuple(window.tolist()) for window in getattr(blend, name)]
        counts = [sum(window in each for window in got) for each in windows]
        assert sum(counts) == len(got)
        if name == "val_dataset":
            assert abs(counts[0] - 3 * counts[1]) <= 3
    rows = [tuple(row.tolist()) for batch in blend.train_dataloader() for row in batch]
    windows = {tuple(window.tolist()) for window in alone[0].train_dataset}
    share = sum(row in windows for row in rows) / len(rows)
    assert abs(share - 0.75) < 0.02


def test_a_path_with_a_weight_is_the_path(tokenizer, texts):
    one, other = (opened(tokenizer, path).train_dataloader() for path in (texts[0], {texts[0]: 0.2}))
    assert [batch.tolist() for batch in one] == [batch.tolist() for batch in other]


def test_weights_of_documents_take_their_lengths_into_account(tokenizer, tmp_path):
    long, short = (write_jsonl(tmp_path / f"{n}.jsonl", [f"the lazy dog {i} " * n for i in range(60)]) for n in (9, 3))
    paths = {str(long): 1, str(short): 3}
    data = opened(tokenizer, paths, weights_of="documents")
    windows = data.train_dataset.datasets
    order = np.asarray(list(data.train_dataloader().sampler))
    tokens = np.histogram(order, [0, len(windows[0]), sum(map(len, windows))])[0] * LENGTH
    n_documents = [n * each.about["n_documents"] / each.about["n_tokens"] for n, each in zip(tokens, windows)]
    assert n_documents[1] / n_documents[0] == pytest.approx(3, rel=0.05)
    by_tokens = opened(tokenizer, paths)
    assert [each.folder for each in by_tokens.train_dataset.datasets] == [each.folder for each in windows]
    assert len(by_tokens.train_dataloader().sampler) != len(order)
    with pytest.raises(UserError, match="data.weights_of must be tokens or documents, got 'words'"):
        HFText(paths, weights_of="words")


@pytest.mark.parametrize("stop", [3, 60])
def test_a_blend_resumes_in_any_epoch(tokenizer, texts, stop):
    def stream():
        return DataStream(opened(tokenizer, dict(zip(texts, (0.8, 0.2)))).train_dataloader())

    whole = stream()
    batches = [next(whole).tolist() for _ in range(stop + 5)]
    part = stream()
    for _ in range(stop):
        next(part)
    resumed = stream()
    resumed.load_state_dict(copy.deepcopy(part.state_dict()))
    assert [next(resumed).tolist() for _ in range(5)] == batches[stop:]


def test_flags_and_settings_of_a_run_hold_the_blend(texts):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataModule | None)
    blend = f"{{{texts[0]}: 0.3, {texts[1]}: 0.7}}"
    config = parser.parse_args(["--data=litgpt_whittle.data.HFText", f"--data.path={blend}"])
    data = parser.instantiate_classes(config).data
    assert data.path == dict(zip(texts, (0.3, 0.7)))
    assert describe(data)["init_args"]["path"] == data.path
    plain = parser.parse_args(["--data=litgpt_whittle.data.HFText", f"--data.path={texts[0]}"])
    assert parser.instantiate_classes(plain).data.path == texts[0]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ({}, "data.path must name text, got an empty mix"),
        ({"a.txt": 0}, "each weight in data.path must be a positive number, got 0 for 'a.txt'"),
        ({"a.txt": -1.0}, "must be a positive number, got -1.0"),
        ({"a.txt": float("inf")}, "must be a positive number, got inf"),
        ({"a.txt": True}, "must be a positive number, got True"),
    ],
)
def test_invalid_blends_are_refused(path, problem):
    with pytest.raises(UserError, match=problem):
        HFText(path)


def test_errors_name_the_text_of_a_blend(tokenizer, texts, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl"):
        opened(tokenizer, {texts[0]: 1, str(tmp_path / "nothing.jsonl"): 1})
    with pytest.raises(UserError, match=r"data.val_path must not be the training data .*alpha\.jsonl"):
        HFText(dict.fromkeys(texts, 1), val_path={texts[0]: 1.0})
    short = write_jsonl(tmp_path / "short.jsonl", ["so"])
    with pytest.raises(UserError, match=r"must fill a block of 17 tokens, got .* in .*short\.jsonl"):
        opened(tokenizer, {texts[0]: 1, str(short): 1}, val_path=texts[1])
