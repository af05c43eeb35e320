"""Measure the speed of scoring candidates, plain and repaired, against the extracted model; and generation latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from bench import STUDENT, TEACHER, Bench

from litgpt_whittle import SubNet, extract_weights, load_model, student_model
from litgpt_whittle import search as run_search
from litgpt_whittle.batches import Batch, calibration_windows, validation_batches
from litgpt_whittle.data.loading import connect
from litgpt_whittle.distillation.head import head_loss, hidden_states
from litgpt_whittle.fitness.perplexity import Perplexity, RepairedPerplexity
from litgpt_whittle.latency import latency as measure_latency
from litgpt_whittle.supergpt import SuperGPT


def search(bench: Bench) -> Iterator[dict]:
    """Run `litgpt search`, then score one candidate inside its teacher and extracted, on the same batches."""
    yield whole_search(bench)
    model, batches, _ = teacher_and_batches(bench, bench.size(4, 2))
    subnet, score = bench.subnet(), Perplexity(model, batches)
    inside = bench.seconds(lambda: score(subnet), 3)
    yield {
        "sizes": f"{len(subnet)} layers, {len(subnet.n_embd)} x {len(subnet.layer(0).intermediate_size)}",
        "tokens_per_s": round(score.n_tokens / inside),
        "busy": bench.busy(lambda: score(subnet), "Search: one candidate"),
    }
    alone = loss_of(extracted(model, subnet, bench), score.batches)
    outside = bench.seconds(alone, 3)
    yield {
        "extracted_tokens_per_s": round(score.n_tokens / outside),
        "busy_extracted": bench.busy(alone, "Search: the extracted model"),
        "ratio": outside / inside,
        "nll_difference": abs(alone() - score(subnet)["nll"]),
    }
    started = time.perf_counter()
    with torch.inference_mode(), model.running(subnet):
        pass
    yield {"plan_s": time.perf_counter() - started, "peak_gb": bench.peak_gb()}


def whole_search(bench: Bench) -> dict:
    """Return the time of a search of 50 candidates, and of one of them."""
    started = time.perf_counter()
    found = run_search(
        bench.checkpoint(TEACHER),
        str(bench.space().bin),
        bench.tokens(),
        bench.folder("search"),
        fitness="perplexity",
        iterations=bench.size(50, 3),
        train={"micro_batch_size": bench.rows, "max_seq_length": bench.length},
        eval={"max_iters": bench.size(4, 2)},
    )
    evaluations = found.findings.evaluations
    if failed := [each.error for each in evaluations if each.error]:
        raise RuntimeError(f"{len(failed)} of {len(evaluations)} candidates failed: {failed[0]}")
    return {
        "search_s": time.perf_counter() - started,
        "candidates": len(evaluations),
        "candidate_s": statistics.median(each.seconds for each in evaluations[1:]),
    }


def search_repaired(bench: Bench) -> Iterator[dict]:
    """Score candidates by the default fitness: the teacher's moments once, then a repair for each candidate."""
    n = bench.size(RepairedPerplexity.n_calibration, 512)
    model, batches, windows = teacher_and_batches(bench, 2, n)
    started = time.perf_counter()
    score = RepairedPerplexity(model, batches, calibration=windows)
    bench.synchronize()
    yield {"moments_s": time.perf_counter() - started, "moments_peak_gb": bench.peak_gb()}
    subnets = [bench.subnet(seed) for seed in range(bench.size(4, 2))]
    times = [bench.seconds(lambda subnet=subnet: score(subnet), 1, 0) for subnet in subnets]
    yield {
        "first_candidate_s": times[0],
        "candidate_s": statistics.median(times[1:]),
        "busy": bench.busy(lambda: score(subnets[-1]), "Search: one repaired candidate"),
        "peak_gb": bench.peak_gb(),
    }


def latency(bench: Bench) -> Iterator[dict]:
    """Measure the latency of the student as in a search, and of a model half as wide and half as deep."""
    config = bench.config(STUDENT)
    half = {"n_embd": config.n_embd // 2, "intermediate_size": config.intermediate_size // 2}
    subnets = {
        "whole": SubNet.full(config),
        "half_as_wide": SubNet(config, **half),
        "half_as_deep": SubNet(config, n_layer=config.n_layer // 2),
    }
    lengths = bench.size((512, 32), (16, 4))
    for name, subnet in subnets.items():
        found = measure_latency(subnet, bench.device, bench.dtype, 1, *lengths)
        yield {
            f"{name}_prefill_ms": found.prefill * 1e3,
            f"{name}_decode_ms": found.decode * 1e3,
        }


def teacher_and_batches(
    bench: Bench, n_batches: int, n_calibration: int = 0
) -> tuple[SuperGPT, list[Batch], torch.Tensor]:
    """Return the teacher on the device, validation batches, and calibration tokens of shape (N, T)."""
    data, folder = bench.tokens(n_calibration), bench.checkpoint(TEACHER)
    connect(data, folder, bench.rows, bench.length)
    batches = validation_batches(data, bench.length, n_batches)
    windows = calibration_windows(data, bench.length, max(n_calibration, 1)).input_ids
    model = load_model(folder, "SuperGPT", bench.dtype, bench.device)
    model.max_seq_length = bench.length
    return model, batches, windows


def extracted(model: SuperGPT, subnet: SubNet, bench: Bench) -> torch.nn.Module:
    """Return a candidate as a standalone model."""
    student = student_model(subnet).to(bench.device, bench.dtype).eval().requires_grad_(False)
    student.load_state_dict(extract_weights(model, subnet))
    student.max_seq_length = bench.length
    return student


def loss_of(model: torch.nn.Module, batches: list[Batch]) -> Callable[[], float]:
    """Return a function that computes a model's mean loss, with the head in chunks as in a search."""

    @torch.inference_mode()
    def run() -> float:
        losses = [head_loss(hidden_states(model, batch.input_ids), batch.targets).ce for batch in batches]
        return float(torch.stack(losses).mean())

    return run
