"""Test the data stream: with any number of processes, each step gets the same batches as with one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from litgpt_whittle.errors import UserError
from litgpt_whittle.training.data_stream import DataStream, SkippingBatches, shared_batches, skipping


class Counted(IterableDataset):
    """Batches that cannot be skipped without being read."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))


def stream(n, kind, rank=0, world_size=1):
    """Return samples 0 … n - 1 in batches of two."""
    if kind == "iterable":
        loader = DataLoader(Counted(n), batch_size=2, drop_last=True)
    else:
        loader = DataLoader(range(n), batch_size=2, drop_last=True, shuffle=True)
    return DataStream(skipping(loader), rank, world_size)


def take(one, n):
    """Return the next n batches; random numbers drawn in between are the same on all processes."""
    batches = []
    for i in range(n):
        batches.append(next(one).tolist())
        torch.rand(i % 3)
    return batches


def streams(n, kind, world_size, n_steps):
    """Return the batches of each process, with separate random generators as in real processes."""
    parts = []
    for rank in range(world_size):
        torch.manual_seed(0)
        parts.append(take(stream(n, kind, rank, world_size), n_steps))
    return parts


def flat(batches):
    return sorted(sample for batch in batches for sample in batch)


@given(st.integers(2, 15), st.integers(1, 4), st.integers(1, 9), st.sampled_from(["shuffled", "iterable"]))
@settings(max_examples=60, deadline=None)
def test_processes_share_each_epoch_without_gaps(n, world_size, n_steps, kind):
    parts = streams(n, kind, world_size, n_steps)
    in_order = [parts[i % world_size][i // world_size] for i in range(world_size * n_steps)]
    per_epoch = n // 2
    for start in range(0, len(in_order), per_epoch):
        epoch = flat(in_order[start : start + per_epoch])
        assert len(set(epoch)) == len(epoch), "an epoch repeats nothing"
        if kind == "iterable":
            assert epoch == list(range(len(epoch)))


@given(st.integers(4, 15), st.integers(1, 3), st.integers(1, 3), st.integers(0, 7), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_stream_goes_on_with_any_number_of_processes(n, before, after, n_steps, is_iterable):
    kind = "iterable" if is_iterable else "shuffled"
    torch.manual_seed(0)
    unbroken = stream(n, kind)
    expected = [next(unbroken).tolist() for _ in range(before * n_steps + 6 * after)][before * n_steps :]
    torch.manual_seed(0)
    first = stream(n, kind, 0, before)
    for _ in range(n_steps):
        next(first)
    state, generator = first.state_dict(), torch.get_rng_state()
    found = {}
    for rank in range(after):
        torch.manual_seed(99 + rank)
        resumed = stream(n, kind, rank, after)
        resumed.load_state_dict(state)
        torch.set_rng_state(generator)
        for i in range(6):
            found[i * after + rank] = next(resumed).tolist()
    assert [found[i] for i in sorted(found)] == expected


def test_other_processes_batches_are_not_read():
    class Remembering:
        read = []

        def __len__(self):
            return 12

        def __getitem__(self, i):
            self.read.append(i)
            return i

    loader = skipping(DataLoader(Remembering(), batch_size=2))
    one = DataStream(loader, 1, 3)
    assert isinstance(loader.batch_sampler, SkippingBatches)
    next(one), next(one)
    assert Remembering.read == [2, 3, 8, 9]


def test_a_resumed_stream_reads_nothing_again():
    loader = skipping(DataLoader(range(20), batch_size=2))
    one = DataStream(loader)
    take(one, 7)
    other = DataStream(skipping(DataLoader(range(20), batch_size=2, collate_fn=torch.tensor)))
    other.load_state_dict(one.state_dict())
    assert next(other).tolist() == [14, 15]


def test_any_iterable_of_batches_is_read_as_it_is():
    loader = DataLoader(range(6), batch_sampler=[[4, 1], [0, 5], [2, 3]])
    assert skipping(loader) is loader
    assert next(DataStream(loader, 1, 2)).tolist() == [0, 5]


def test_a_loader_without_batches_is_refused():
    with pytest.raises(UserError, match="must fill at least one batch"):
        next(stream(1, "iterable"))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9))
@settings(deadline=None)
def test_shared_batches_count_once_and_are_equally_many(n, world_size, most):
    shares = [list(shared_batches(range(n), most, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(batch for share in shares for batch, counts in share if counts) == list(range(min(n, most)))
