"""Test process measurements across systems, and waiting between processes."""

import multiprocessing
import resource
import socket
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import distributed

from litgpt_whittle import plugin, processes
from litgpt_whittle.processes import peak_resident


def test_the_peak_of_memory_is_that_of_the_system():
    """The oracle is psutil, whose current figure is below the peak, up to the kernel's delayed accounting."""
    now = psutil.Process().memory_info().rss
    assert 0.9 * now < peak_resident() < 100 * now


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_is_in_bytes_on_every_system(monkeypatch, platform, unit):
    """getrusage(2): kilobytes on Linux, bytes on macOS."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: resource.struct_rusage([0.0, 0.0, 5000, *range(13)]))
    assert peak_resident() == 5000 * unit


@pytest.mark.parametrize(("local_rank", "device"), [(None, "cuda"), ("0", "cuda"), ("3", "cuda:3")])
def test_each_process_uses_its_own_gpu_before_it_is_connected(monkeypatch, local_rank, device):
    """By default, the first GPU is the current one of all processes."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert processes.own_device() == torch.device(device)


def wait_for_a_slow_process(rank, port, out):
    """Use every way of waiting while the first process takes twice the timeouts of the group and the store."""
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    processes.barrier()  # as in `launch`, all processes create their second group together
    for waits in (distributed.distributed_c10d._get_default_store().set_timeout, set_group_timeout):
        waits(timedelta(seconds=0.25))

    def slow(value=0):
        time.sleep(0.5)
        return value

    found = [processes.on_rank_zero(slow)]
    if rank == 0:
        slow()
    processes.barrier()
    found += processes.gather(slow(rank) if rank == 0 else rank)
    found += processes.parallel_map(slow, [10, 20, 30])
    is_first = rank == 0 and slow() == 0
    assert processes.shutdown() is is_first
    out.put((rank, found))


def set_group_timeout(timeout):
    distributed.distributed_c10d._set_pg_timeout(timeout, distributed.group.WORLD)


def test_processes_wait_for_one_however_long_it_takes():
    """Tokenising and saving on one process may exceed the half-hour timeout of NCCL and Gloo, here 0.25 seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forked = multiprocessing.get_context("fork")
    out = forked.SimpleQueue()
    started = [forked.Process(target=wait_for_a_slow_process, args=(rank, port, out)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    assert sorted(out.get() for _ in started) == [(rank, [0, 0, 1, 10, 20, 30]) for rank in range(2)]


def test_free_memory_includes_what_the_allocator_keeps_for_reuse(monkeypatch):
    gpu = SimpleNamespace(
        mem_get_info=lambda device: (100, 1000), memory_reserved=lambda device: 300, memory_allocated=lambda device: 250
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    assert processes.free_memory(torch.device("cuda"), 1) == 150


def test_a_full_device_ends_any_command_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", lambda *_: pytest.fail("a traceback"))
    plugin.show_user_errors_in_one_line(set())
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB.\nMore"
    sys.excepthook(torch.OutOfMemoryError, torch.OutOfMemoryError(said), None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "Tried to allocate 2.00 GiB); lower --train.micro_batch_size" in line and "expandable_segments:True" in line
