"""Measure speed, memory and values on one GPU in at most eight minutes: `python benchmarks/gpu/run.py --out DIR`.

The steps run in order of importance, each in its own process, on models with random weights. A step that fails, or for
which no time remains, is reported, and the others run. README.md describes the steps.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from goals import table

BUDGET = 480
"""Seconds for all steps"""
TOY_FACTOR = 10
"""Factor of all limits with --tiny, for slow CPUs"""
LEAST = 10
"""Minimum remaining seconds to start a step"""


@dataclass(frozen=True)
class Step:
    """One measurement."""

    function: str
    """Module and function; it yields figures by name as soon as they are known"""
    limit: float
    """Maximum seconds"""


STEPS = {
    "card": Step("card:card", 40),
    "values": Step("values:values", 70),
    "distill": Step("training:distill", 110),
    "pretrain": Step("training:pretrain", 90),
    "teacher": Step("training:teacher", 50),
    "search": Step("searching:search", 75),
    "repair_250k": Step("repairs:repair_250k", 60),
    "head": Step("heads:head", 60),
    "search_repaired": Step("searching:search_repaired", 60),
    "repair_1m": Step("repairs:repair_1m", 120),
    "distill_eager": Step("training:distill_eager", 50),
    "fsdp": Step("sharded:fsdp", 60),
    "distill_cached": Step("training:distill_cached", 60),
    "distill_repaired": Step("training:distill_repaired", 60),
    "latency": Step("searching:latency", 25),
    "rank": Step("repairs:rank", 30),
    "prune": Step("repairs:prune", 45),
    "distill_bf16_true": Step("training:distill_bf16_true", 80),
}
"""In order of importance"""

PRELOADED = ["litgpt.pretrain", "torch.profiler", "litgpt_whittle.api", "litgpt_whittle.commands.cache_teacher"]
PRELOADED += ["litgpt_whittle.commands.rank", "litgpt_whittle.commands.prune", "litgpt_whittle.supernet"]
"""Imported once, in the process that all steps are forked from"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl, profiles.txt and log.txt")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU if there is no GPU")
    parser.add_argument("--budget", type=float, help=f"seconds for all steps (default {BUDGET}, with --tiny none)")
    parser.add_argument("--work", type=Path, help="folder to keep the models in (default: a temporary one)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run(*args.child, args.out, args.work, args.tiny)
        return
    started = time.monotonic()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looks for a GPU without starting CUDA
    args.out.mkdir(parents=True, exist_ok=True)
    budget = args.budget or (BUDGET * TOY_FACTOR if args.tiny else BUDGET)
    results = args.out / "results.jsonl"
    has_failed = False
    with tempfile.TemporaryDirectory() as temporary:
        args.work = args.work or Path(temporary)
        # compiled kernels of one step serve the others
        for name, folder in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
            os.environ.setdefault(name, str(args.work / folder))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        begin(context)
        print(f"imports took {time.monotonic() - started:.0f} s", flush=True)
        for name in [name for name in STEPS if name in (args.only or STEPS)]:
            row = measure(name, budget - (time.monotonic() - started), context, args)
            has_failed |= "error" in row
            line = json.dumps(row)
            print(line, flush=True)
            with open(results, "a") as file:
                file.write(line + "\n")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    print(f"\n{table(row for row in rows if row['tiny'] == args.tiny)}\n\n{time.monotonic() - started:.0f} s")
    sys.exit(has_failed)


def begin(context: Any) -> None:
    """Start the process that all steps are forked from, and wait until it has imported everything."""
    process = context.Process(target=int)
    process.start()
    process.join()


def measure(name: str, left: float, context: Any, args: argparse.Namespace) -> dict:
    """Run a step in its own process, and return its line of results.jsonl.

    Args:
        name: The step's name.
        left: Remaining seconds for all steps.
        context: The way to start processes.
        args: The command line.
    """
    head = {"step": name, "tiny": args.tiny}
    if left < LEAST:
        return head | {"skipped": f"{max(left, 0):.0f} s are left"}
    limit = min(STEPS[name].limit * (TOY_FACTOR if args.tiny else 1), left)
    result, began = args.work / f"{name}.json", time.monotonic()
    result.unlink(missing_ok=True)
    process = context.Process(target=run, args=(name, result, args.out, args.work, args.tiny))
    process.start()
    process.join(limit)
    is_late = process.is_alive()
    if is_late:
        stop(process)
    row = json.loads(result.read_text()) if result.is_file() else {"figures": {}}
    if is_late:
        row["error"] = f"not finished after {limit:.0f} s"
    elif process.exitcode:
        row.setdefault("error", f"the process ended with exit code {process.exitcode}; see log.txt")
    return head | {"seconds": round(time.monotonic() - began, 1)} | row


def stop(process: Any) -> None:
    """End a step and its child processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # its process group does not exist yet
        process.kill()
    process.join()


def run(name: str, result: Path, out: Path, work: Path, tiny: bool) -> None:
    """Run a step in this process, and write its figures, or its error, to `result`."""
    import torch

    is_forked = multiprocessing.parent_process() is not None
    if is_forked:
        os.setsid()
        log = os.open(out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
    if is_forked and torch.cuda._is_in_bad_fork():  # an import has started CUDA, which a fork cannot use
        flags = ["--tiny"] if tiny else []
        command = [sys.executable, __file__, f"--out={out}", f"--work={work}", "--child", name, str(result), *flags]
        os.execv(sys.executable, command)
    print(f"===== {name}", flush=True)
    torch.set_float32_matmul_precision("high")  # as litgpt's command line does
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    if tiny:  # graphs are captured as on a card, but no kernels are generated, which takes a minute for each model
        torch.compile = partial(torch.compile, backend="aot_eager")
    found: dict = {"figures": {}}
    try:
        sys.path.insert(0, str(Path(__file__).parent))
        from bench import Bench

        module, _, function = STEPS[name].function.partition(":")
        for figures in getattr(import_module(module), function)(Bench(Path(out), Path(work), tiny)):
            found["figures"] |= rounded(figures)
            save(found, result)
    except BaseException as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {str(error)[:400]}"
        save(found, result)
        raise SystemExit(1) from None


def save(found: dict, result: str | Path) -> None:
    """Write a step's figures atomically, because the step may be stopped at any time."""
    new = Path(result).with_suffix(".new")
    new.write_text(json.dumps(found, default=float))
    os.replace(new, result)


def rounded(value: Any) -> Any:
    """Round all numbers with a fraction to four digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
