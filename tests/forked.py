"""Run programs in processes that are forked from one with everything imported.

A start takes milliseconds instead of the many seconds of importing PyTorch, litgpt and their dependencies. The parent
is Python's fork server, which has run nothing but these imports: state of the test process, such as random numbers,
warnings and patched functions, does not reach the programs.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

COMMANDS = "cache_teacher", "distill", "extract", "pretrain_supernet", "prune", "rank", "report", "search", "whittle"
IMPORTED = (*(f"litgpt_whittle.commands.{name}" for name in COMMANDS), "hypothesis", "pytest", "transformers")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(IMPORTED))


class Done(NamedTuple):
    """Result of a program: the exit code of the first process that failed, and the output of all processes."""

    returncode: int
    stdout: str
    stderr: str


class Program:
    """A Python program in one process, or in several that are connected as by torchrun.

    Args:
        command: A script or `-m` and a module, and their arguments.
        n: Number of processes.
        environment: Variables in addition to this process's own.
        cwd: Working directory.
    """

    def __init__(self, *command: object, n: int = 1, cwd: Path | None = None, environment: Mapping[str, str] = {}):
        self._folder = tempfile.TemporaryDirectory()
        shared = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        connected = _torchrun(n) if n > 1 else [{}]
        self._processes = [
            _context.Process(target=_run, args=([*map(str, command)], shared | own, cwd, self._path("", rank)))
            for rank, own in enumerate(connected)
        ]
        for process in self._processes:
            process.start()

    def _path(self, name: str, rank: int) -> str:
        return f"{self._folder.name}/{rank}{name}"

    @property
    def pid(self) -> int:
        """The first process."""
        return self._processes[0].pid

    @property
    def children(self) -> list[int]:
        """Return the processes that the first one has started."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def poll(self) -> int | None:
        """Return the exit code, or None while a process is running."""
        codes = [process.exitcode for process in self._processes]
        return None if None in codes else next(filter(None, codes), 0)

    def printed(self, name: str = ".out") -> str:
        """Return what has been printed so far."""
        paths = [Path(self._path(name, rank)) for rank in range(len(self._processes))]
        return "".join(path.read_text() for path in paths if path.exists())

    def send(self, sent: int) -> None:
        """Send a signal to all processes, including those that they have started."""
        for process in self._processes:
            while process.is_alive():
                try:
                    os.killpg(process.pid, sent)
                    break
                except ProcessLookupError:  # its process group does not exist yet
                    time.sleep(0.001)

    def kill(self) -> None:
        """Kill all processes at once, as when a machine fails."""
        self.send(signal.SIGKILL)
        self.finish()

    def finish(self, timeout: float = 250) -> Done:
        """Wait for the end; kill all processes on a timeout.

        Raises:
            TimeoutError: If the program did not end in time.
        """
        deadline = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0, deadline - time.monotonic()))
        if self.poll() is None:
            self.kill()
            raise TimeoutError(f"after {timeout} seconds: {self.printed()} {self.printed('.err')}")
        return Done(self.poll(), self.printed(), self.printed(".err"))


def run(*command: object, **settings) -> Done:
    """Run a program to its end; for the arguments, see `Program`."""
    return Program(*command, **settings).finish()


def _torchrun(n: int) -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0"}
    shared |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]


def _run(command: list[str], environment: dict[str, str], cwd: Path | None, printed: str) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    for number, name in ((1, ".out"), (2, ".err")):
        file = os.open(printed + name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if cwd is not None:
        os.chdir(cwd)
    import torch
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    torch.set_num_threads(1)
    gc.freeze()  # as in the test process itself
    rank_zero_only.rank = int(environment.get("RANK", 0))  # Lightning sets this when it is imported
    try:
        if command[0] == "-m":
            sys.argv[:] = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = command
            runpy.run_path(command[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
