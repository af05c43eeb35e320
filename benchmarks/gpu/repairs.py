"""Measure the time of the commands that run through a teacher's blocks: repair, ranking and pruning."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench import STUDENT, TEACHER, Bench

from litgpt_whittle import extract
from litgpt_whittle.batches import (
    BatchArgs,
    BudgetArgs,
)
from litgpt_whittle.commands import prune as prune_command
from litgpt_whittle.commands import rank as rank_command


def repair_250k(bench: Bench) -> Iterator[dict]:
    """Run `litgpt extract --repair` with 250,000 calibration tokens."""
    yield repair(bench, bench.size(250_000, 512))


def repair_1m(bench: Bench) -> Iterator[dict]:
    """Run `litgpt extract --repair` with a million calibration tokens."""
    yield repair(bench, bench.size(1_000_000, 2048))


def repair(bench: Bench, tokens: int) -> dict:
    """Return the seconds of a repair, from the teacher's checkpoint to the student's."""
    bench.checkpoint(TEACHER)  # not timed
    started = time.perf_counter()
    student = repaired_student(bench, tokens)
    seconds = time.perf_counter() - started
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": round(tokens / seconds),
        "n_params": student.n_params,
        "peak_gb": bench.peak_gb(),
    }


def repaired_student(bench: Bench, tokens: int):
    """Return the checkpoint of a repaired student, whose sizes are those that a search proposes."""
    folder = bench.folder("repaired")
    bench.subnet().save(bench.work / f"{folder.name}.yaml")
    return extract(
        bench.work / f"{folder.name}.yaml",
        bench.checkpoint(TEACHER),
        bench.tokens(tokens),
        folder,
        repair={"tokens": tokens},
        train={"micro_batch_size": bench.rows, "max_seq_length": bench.length},
    )


def rank(bench: Bench) -> Iterator[dict]:
    """Run `litgpt rank` on the teacher."""
    tokens, layer_tokens = bench.size((32_768, 8_192), (512, 256))
    folder, train = bench.checkpoint(TEACHER), BatchArgs(bench.rows // 2, bench.length)
    started = time.perf_counter()
    rank_command.setup(
        folder, bench.tokens(tokens), bench.folder("rank"), tokens=tokens, layer_tokens=layer_tokens, train=train
    )
    yield {"tokens": tokens, "seconds": time.perf_counter() - started, "peak_gb": bench.peak_gb()}


def prune(bench: Bench) -> Iterator[dict]:
    """Run `litgpt prune --pattern 2:4` on the student."""
    tokens, folder = bench.size(16_384, 512), bench.checkpoint(STUDENT)
    train, evaluation = BatchArgs(bench.rows // 2, bench.length), BudgetArgs(1)
    started = time.perf_counter()
    prune_command.setup(
        folder,
        bench.folder("pruned"),
        pattern="2:4",
        data=bench.tokens(tokens),
        tokens=tokens,
        train=train,
        eval=evaluation,
    )
    yield {"tokens": tokens, "seconds": time.perf_counter() - started, "peak_gb": bench.peak_gb()}
