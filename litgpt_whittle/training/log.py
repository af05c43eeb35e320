"""Metrics reported during training: to the terminal, litgpt's logger and `metrics.jsonl`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.utilities.throughput import ThroughputMonitor

from litgpt_whittle.figures.curves import plot_training
from litgpt_whittle.files import readable_size
from litgpt_whittle.metrics_log import MetricsLog
from litgpt_whittle.processes import all_reduce_sum, peak_memory
from litgpt_whittle.training.run import Run
from litgpt_whittle.vocabulary.text_bytes import bits_per_byte


class TrainLog:
    """Reports a run's metrics to the terminal, litgpt's logger and `metrics.jsonl`."""

    bytes_per_token: float | None = None
    """Mean bytes of validation text per token; if set, validation losses are also logged in bits per byte"""

    def __init__(self, run: Run, log_interval: int) -> None:
        self.run = run
        self.interval = log_interval
        self.throughput = ThroughputMonitor(run.fabric, window_size=5)
        self.first_iter, self.first_seconds = run.progress.iter_num, run.progress.seconds
        self.started = self.last_time = time.perf_counter()
        self.last_iter = run.progress.iter_num
        self.sums: dict[str, torch.Tensor] = {}
        """For each scalar: weighted sum of its values and sum of the weights, shape (2,)"""
        is_main = run.fabric.global_rank == 0
        self.file = MetricsLog(run.out_dir / "metrics.jsonl", run.progress.iter_num) if is_main else None

    def add(self, scalars: Mapping[str, torch.Tensor], weight: float = 1.0) -> None:
        """Add one micro-batch's scalars without waiting for the device; NaN values are left out.

        Args:
            scalars: Means over the tokens that count.
            weight: Weight of this micro-batch in the logged means, proportional to the number of these tokens.
        """
        for name, value in scalars.items():
            one = torch.stack([value.nan_to_num(0.0, torch.inf, -torch.inf), ~value.isnan()])
            self.sums[name] = self.sums.get(name, 0) + one * weight

    def train_step(self) -> None:
        """Log the means since the last report, at every `log_interval`-th optimizer step; otherwise, do nothing."""
        run, progress = self.run, self.run.progress
        if progress.iter_num % (self.interval * run.schedule.accumulation) != 0:
            return
        totals = all_reduce_sum(torch.stack([*self.sums.values()]))
        pairs = zip(self.sums, totals.tolist())  # waits for the device
        means = {name: total / n for name, (total, n) in pairs if n}
        self.sums = {}
        now = time.perf_counter()
        iters, seconds = progress.iter_num - self.last_iter, now - self.last_time
        self.last_iter, self.last_time = progress.iter_num, now
        done = progress.iter_num - self.first_iter
        tokens_per_second = iters * run.schedule.tokens_per_iter * run.fabric.world_size / max(seconds, 1e-9)
        row = {
            "loss": math.nan,  # kept if every micro-batch's loss was NaN
            **means,
            "iter": progress.iter_num,
            "step": progress.step_count,
            "epoch": run.stream.epoch,
            "iter_time": seconds / iters,
            "remaining_time": (now - self.started) / done * (run.schedule.max_iters - progress.iter_num),
            "tokens": self._tokens(),
            "total_tokens": self._tokens() * run.fabric.world_size,
            "learning_rate": run.job.optimizer.param_groups[0]["lr"],
            "tokens_per_second": tokens_per_second,
        }
        self._print_step(row)
        self._write(row, progress.iter_num - 1, self._throughput(now))

    def _throughput(self, now: float) -> dict[str, float]:
        """Return the metrics of Lightning's throughput monitor."""
        done = self.run.progress.iter_num - self.first_iter
        samples_per_iter = self.run.schedule.tokens_per_iter // self.run.seq_length
        self.throughput.update(
            time=now - self.started,
            batches=done,
            samples=done * samples_per_iter,
            lengths=done * self.run.schedule.tokens_per_iter,
            flops=self.run.job.flops_per_iter * self.interval * self.run.schedule.accumulation or None,
        )
        return self.throughput.compute()

    def _print_step(self, row: dict[str, Any]) -> None:
        parts = ", ".join(f"{name} {row[name]:.3f}" for name in ("ce", "distill", "hidden") if name in row)
        val = "n/a" if self.run.progress.val_loss is None else f"{self.run.progress.val_loss:.3f}"
        self.run.fabric.print(
            f"epoch {row['epoch'] + 1} | step {row['step']} | loss {row['loss']:.3f}{f' ({parts})' if parts else ''} | "
            f"val {val} | lr {row['learning_rate']:.2e} | {row['tokens_per_second']:,.0f} tokens/s | "
            f"{timedelta(seconds=int(row['remaining_time']))} left"
        )

    def validation(self, val_loss: float, more: Mapping[str, float], final: bool = False) -> None:
        """Log validation losses in nats per token: the model's, and further ones (`more`) by name."""
        progress = self.run.progress
        progress.val_loss = val_loss
        row = {"val_loss": val_loss, "val_ppl": perplexity(val_loss)}
        row |= self._bits_per_byte("val", val_loss)
        row |= {f"val_loss/{name}": loss for name, loss in more.items()}
        self.run.fabric.print(
            f"{'final' if final else f'step {progress.step_count}'} | val loss {val_loss:.4f} | "
            f"val perplexity {row['val_ppl']:.3f}{_as_text(row, 'val')}"
            + "".join(f" | {name} {perplexity(x):.3f}" for name, x in more.items())
        )
        where = {"iter": progress.iter_num, "step": progress.step_count, "tokens": self._tokens()}
        self._write(where | row, progress.iter_num - (0 if final else 1), {}, row)

    def start_clock(self) -> None:
        """Start the clock of the throughput and of the estimated time left."""
        self.started = self.last_time = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of a context from the next report's throughput."""
        begin = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - begin

    def teacher_validation(self, val_loss: float) -> None:
        """Log the teacher's validation loss in nats per token."""
        row = {"teacher_val_loss": val_loss, "teacher_val_ppl": perplexity(val_loss)}
        row |= self._bits_per_byte("teacher_val", val_loss)
        self.run.fabric.print(
            f"teacher | val loss {val_loss:.4f} | val perplexity {row['teacher_val_ppl']:.3f}"
            f"{_as_text(row, 'teacher_val')}"
        )
        self._write({"iter": 0, "tokens": 0} | row, 0, {}, row)

    def _bits_per_byte(self, name: str, loss: float) -> dict[str, float]:
        if self.bytes_per_token is None:
            return {}
        return {f"{name}_bits_per_byte": bits_per_byte(loss, self.bytes_per_token)}

    def _tokens(self) -> int:
        """Return the number of tokens that each process has trained on."""
        return self.run.progress.iter_num * self.run.schedule.tokens_per_iter

    def _write(self, row: dict, step: int, more: dict, logged: dict | None = None) -> None:
        """Write a row to `metrics.jsonl`, and the values of `logged` (by default the row) and `more` to the logger."""
        self.run.fabric.log_dict((row if logged is None else logged) | more, step=step)
        if self.file is not None:
            self.file.write(row)

    def finish(self) -> None:
        """Draw the training plot and print a summary."""
        run = self.run
        if self.file is not None:
            plot_training(self.file.path, run.out_dir / "training.png")
        tokens = (run.progress.iter_num - self.first_iter) * run.schedule.tokens_per_iter * run.fabric.world_size
        seconds = max(1e-9, run.progress.seconds - self.first_seconds)
        run.fabric.print(f"Trained on {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
        run.fabric.print(f"Peak memory {readable_size(peak_memory(run.fabric.device))}")


def _as_text(row: Mapping[str, float], name: str) -> str:
    bits = row.get(f"{name}_bits_per_byte")
    return "" if bits is None else f" | {bits:.4f} bits per byte"


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats per token; infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
