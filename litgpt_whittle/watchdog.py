"""End all processes of a distributed run when one of them fails.

Lightning starts the processes together with an observer thread that kills this process, without a message, when another
one has failed. There is no option to replace that thread (Lightning 2.6, `_launch_process_observer`), so `watch`
disables its check. A process may wait in a collective that never returns, where no exception can reach it; that is why
processes are ended by `os._exit` and SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from subprocess import Popen
from typing import Any, NoReturn

PERIOD = 0.2
"""Seconds between two checks of the other processes"""


def watch(fabric: Any) -> None:
    """Start a thread that ends this process with a message when a process that Fabric's launcher started has failed."""
    processes: Sequence[Popen] = getattr(fabric._strategy.launcher, "procs", [])
    if not processes:
        return
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._run = lambda: True  # type: ignore[attr-defined]

    def check() -> None:
        while any(code is None for code in [process.poll() for process in processes]):
            _end_if_failed(processes)
            time.sleep(PERIOD)
        _end_if_failed(processes)

    threading.Thread(target=check, daemon=True, name="process-watch").start()


def _end_if_failed(processes: Sequence[Popen]) -> None:
    for i, process in enumerate(processes, 1):
        if process.returncode:
            end(f"process {i} of {len(processes) + 1} ended with exit code {process.returncode}", processes)


def end(reason: str, processes: Sequence[Popen] = ()) -> NoReturn:
    """Print an error, kill `processes`, and end this process with exit code 1 from any thread."""
    resume = "run the same command again to resume (add --resume true where the command has it)"
    print(f"Error: {reason}; finished work is kept, {resume}", file=sys.stderr, flush=True)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    os._exit(1)


def end_silently() -> NoReturn:
    """End this process with exit code 0, for a rank whose error another rank reports.

    A normal exit would wait for the other processes, and a failed rank would end rank 0 before its message.
    """
    os._exit(0)


# looked up at import, since little is allowed between fork and exec
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
"""Constant of linux/prctl.h"""


def stop_with_parent() -> None:
    """Make Linux send SIGTERM to this process when its parent ends; for `preexec_fn` of a subprocess."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
