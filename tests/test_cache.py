"""Test the store of teacher predictions: lookup of targets by window, and detection of damage."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt_whittle.distillation import cache as module
from litgpt_whittle.distillation.cache import (
    Cache,
    Contents,
    Index,
    Layout,
    Shard,
    _Table,
    shard_path,
    window_key,
    write_shard,
)
from litgpt_whittle.distillation.codecs import with_settings
from litgpt_whittle.distillation.objective import SparseTargets
from litgpt_whittle.errors import UserError
from litgpt_whittle.training.teacher import CachedTeacher

V, T = 300, 6


def contents(**changes):
    values = {"teacher": "t", "weights": "0", "vocab_size": V, "codec": with_settings("full"), "temperature": None}
    values |= {"seed": 0, "precision": "32-true", "max_seq_length": T, "max_tokens": None, "micro_batch_size": 1}
    return Contents(**(values | {"shard_bytes": 1, "data": {}} | changes))


def windows(n, seed=0):
    return torch.randint(V, (n, T), generator=torch.Generator().manual_seed(seed))


def logits_of(ids):
    """Return made-up logits that differ for every window."""
    generator = torch.Generator().manual_seed(int.from_bytes(window_key(ids.numpy())[:4], "big"))
    return torch.randn(T, V, generator=generator)


def write(folder, ids, per_shard=3, **changes):
    """Write a finished cache of different windows (n, T)."""
    folder.mkdir()
    about = contents(**changes)
    codec = about.make_codec()
    layout, shards = Layout(codec, ids.size(1)), []
    for part in ids.split(per_shard):
        targets = [codec.encode(logits_of(window), torch.zeros(T, codec.n_uniform)) for window in part]
        batches = [layout.records(window[None], target[None]) for window, target in zip(part, targets)]
        keys = [window_key(window.numpy()) for window in part]
        shards.append(write_shard(shard_path(folder, len(shards)), keys, batches))
    Index(about, ids.size(1), tuple(shards), complete=True).write(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "cache", windows(8))


# -- windows and their targets


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=20)
def test_every_window_finds_its_own_targets_in_any_batch(tmp_path_factory, seed, batch_size, per_shard):
    """Any order, batch size and epoch; a window may occur twice in a batch."""
    rng = random.Random(seed)
    ids = windows(9, seed)
    teacher = CachedTeacher(Cache(write(tmp_path_factory.mktemp("c") / "cache", ids, per_shard)), torch.device("cpu"))
    for _ in range(3):
        batch = ids[[rng.randrange(9) for _ in range(batch_size)]]
        said = teacher(batch)
        expected = torch.cat([logits_of(window) for window in batch])
        start, stop = sorted(rng.choices(range(len(expected) + 1), k=2))
        assert torch.equal(said.chunk(start, stop), expected[start:stop])


def test_a_window_that_differs_in_one_token_is_another(folder):
    cache, batch = Cache(folder), windows(8)[:2].clone()
    batch[1, -1] = (batch[1, -1] + 1) % V
    with pytest.raises(UserError, match="lacks a window that begins with the tokens .* other data, another") as refused:
        cache.targets(batch)
    assert str(batch[1].tolist()) in str(refused.value) and "\n" not in str(refused.value)


def test_windows_of_another_length_are_refused(folder):
    with pytest.raises(UserError, match="have 6 tokens, got one of 5; use the data and the train.max_seq_length"):
        Cache(folder).targets(windows(8)[:, :-1])


def test_a_batch_that_was_looked_up_is_not_read_from_the_device(folder):
    """The device is `meta`, from which nothing can be read."""
    teacher, batch = CachedTeacher(Cache(folder), torch.device("cpu")), windows(8)[:2]
    for ids in batch.split(1):
        teacher.look_up(ids)
        assert torch.equal(teacher(ids.to("meta")).chunk(0, T), logits_of(ids[0]))


def test_cached_targets_move_to_any_device(folder):
    teacher = CachedTeacher(Cache(folder), torch.device("meta"))
    assert teacher(windows(8)[:2]).chunk(0, T).device.type == "meta"


def test_targets_may_be_overwritten(folder):
    teacher = CachedTeacher(Cache(folder), torch.device("cpu"))
    said = teacher(windows(8)[:1])
    expected = said.chunk(0, T).clone()
    said.chunk(0, T).zero_()
    assert torch.equal(said.chunk(0, T), expected) and torch.equal(teacher(windows(8)[:1]).chunk(0, T), expected)


@pytest.mark.parametrize("codec", [{"top_k": {"k": 5}}, {"sampled": {"draws": 3}}])
def test_sparse_codecs_come_back_as_they_were_encoded(tmp_path, codec):
    cache = Cache(write(tmp_path / "cache", windows(4), codec=with_settings(codec), temperature=0.9))
    got = CachedTeacher(cache, torch.device("cpu"))(windows(4)).chunk(2, 20)
    logits = torch.cat([logits_of(window) for window in windows(4)])
    expected = cache.codec.decode(cache.codec.encode(logits, torch.zeros(4 * T, cache.codec.n_uniform)))
    assert isinstance(got, SparseTargets)
    for a, b in zip(got, expected):
        assert (a is None and b is None) or torch.equal(a, b[2:20])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1)), unique=True), st.integers(0, 2**64 - 1))
def test_the_table_is_a_dictionary(pairs, other):
    """Including keys that agree in one half."""
    keys = [high.to_bytes(8, "big") + low.to_bytes(8, "big") for high, low in pairs]
    table = _Table(np.frombuffer(b"".join(keys), "u1").reshape(-1, 16))
    rows = {key: row for row, key in enumerate(keys)}
    for key in [*keys, bytes(8) + other.to_bytes(8, "big"), other.to_bytes(8, "big") + bytes(8)]:
        assert table.find(key) == rows.get(key)


def test_shards_are_mapped_not_read(folder):
    cache = Cache(folder)
    assert cache.n_windows == 8
    assert all(isinstance(shard, np.memmap) for shard in cache._windows.values()) and len(cache._windows) == 3


# -- damage


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("position", [0, 3 * 16 + 1, -1, 4000])
def test_a_flipped_bit_is_found_when_the_cache_is_opened(folder, position):
    """In keys, tokens and targets."""
    flip(shard_path(folder, 1), position)
    with pytest.raises(UserError, match="shard-00001.bin' is damaged: its checksum .* remove it, and repeat"):
        Cache(folder)


def test_of_a_large_cache_a_shard_is_checked_before_its_first_use(folder, monkeypatch):
    monkeypatch.setattr(module, "EAGER_BYTES", 100)
    flip(shard_path(folder, 1), -1)
    cache = Cache(folder)
    assert cache.targets(windows(8)[[0, 7]]).shape == (2 * T, V)
    with pytest.raises(UserError, match="shard-00001.bin' is damaged"):
        cache.targets(windows(8)[[4]])


def test_a_truncated_shard_is_named(folder, monkeypatch):
    monkeypatch.setattr(module, "EAGER_BYTES", 0)
    path = shard_path(folder, 2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00002.bin' is damaged: it has 14,\d+ bytes instead of 14,\d+"):
        Cache(folder)


def test_a_missing_shard_is_named(folder):
    shard_path(folder, 0).unlink()
    with pytest.raises(UserError, match="shard-00000.bin' is damaged: the file is missing"):
        Cache(folder)


def test_swapped_shards_are_named(folder):
    first, second = (shard_path(folder, i) for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(UserError, match="shard-00000.bin' is damaged"):
        Cache(folder)


def test_tokens_that_are_not_those_of_their_key_are_noticed(folder):
    """Even if the checksum is right: targets of another window are never used."""
    flip(shard_path(folder, 0), 3 * 16)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0][1] = module.checksum_of(shard_path(folder, 0))
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="shard-00000.bin' is damaged: the tokens of a window"):
        Cache(folder).targets(windows(8)[:1])


def test_a_shard_is_written_whole_or_not_at_all(tmp_path):
    def batches():
        yield np.zeros(100)
        assert list(tmp_path.glob(".shard-*")) and not shard_path(tmp_path, 0).exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(shard_path(tmp_path, 0), [bytes(16)], batches())
    assert not shard_path(tmp_path, 0).exists()
    module.remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_told(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", write)
    with pytest.raises(UserError, match=r"shard-00000.bin' cannot be written \(No space left on device\); free some"):
        write_shard(shard_path(tmp_path, 0), [bytes(16)], [])
    assert not list(tmp_path.iterdir())


# -- the index


def test_an_index_comes_back(folder):
    index = Index.read(folder)
    assert index.contents == contents() and index.length == T and index.complete
    assert [shard.n_windows for shard in index.shards] == [3, 3, 2]
    assert index.shards[0] == Shard(3, module.checksum_of(shard_path(folder, 0)))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index | {"version": 2}, "is of another version of litgpt_whittle"),
        (lambda index: index | {"complete": False}, "is not finished; continue it with"),
        (lambda index: index | {"length": None}, "is not finished"),
        (lambda index: index | {"length": 10**12}, "a window must take less than 2 GB"),
        (lambda index: index | {"length": -1}, "is damaged"),
        (lambda index: index | {"shards": [[3, 1.5]]}, "is damaged"),
        (lambda index: index | {"shards": [["../../secret", 1]]}, "is damaged"),
        (lambda index: {}, "is damaged"),
        (lambda index: [], "is damaged"),
        (lambda index: index | {"contents": index["contents"] | {"more": 1}}, "is damaged"),
        (lambda index: index | {"contents": index["contents"] | {"codec": "full"}}, "is damaged"),
        (
            lambda index: index | {"contents": index["contents"] | {"codec": {"os:system": {}}}},
            "there is no 'os:system'",
        ),
        (
            lambda index: index | {"contents": index["contents"] | {"codec": {"full": {"x": "rm"}}}},
            "has no setting 'x'",
        ),
        (lambda index: index | {"contents": index["contents"] | {"vocab_size": 301}}, "bytes instead of"),
        (lambda index: index | {"contents": index["contents"] | {"temperature": "hot"}}, "is damaged"),
    ],
)
def test_an_index_that_is_none_is_refused_in_one_line(folder, change, message):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(change(index)))
    with pytest.raises(UserError, match=message) as refused:
        Cache(folder)
    assert "\n" not in str(refused.value)


def test_a_folder_without_an_index_is_no_cache(tmp_path):
    with pytest.raises(UserError, match="is not a teacher's cache, it has no index.json; make one with"):
        Cache(tmp_path)


def test_caches_from_strangers_cannot_run_code(folder, tmp_path):
    """A malicious pickle would write a file on loading; it replaces the index, a shard and the config."""

    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    (folder / "model_config.yaml").write_text(f"!!python/object/apply:os.system ['touch {tmp_path / 'owned'}']")
    with pytest.raises(UserError, match="model_config.yaml' is not YAML"):
        Cache(folder).teacher_config
    shard_path(folder, 0).write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="shard-00000.bin' is damaged"):
        Cache(folder)
    (folder / "index.json").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="index.json' is damaged"):
        Cache(folder)
    assert not (tmp_path / "owned").exists()
