"""Training loop of `litgpt distill` and of every other command that trains on next tokens.

A `Job` computes the gradients and scores of a batch, and saves the weights. The loop adds accumulation, clipping,
learning rate, validation, logging, checkpoints, stopping and resuming. Operations shared with `litgpt pretrain` run in
the same order, so that random numbers, and thus initial weights and data order, match litgpt's.
"""

from __future__ import annotations

import math
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from litgpt.args import EvalArgs
from litgpt.data import DataModule
from torch.distributed.tensor import DTensor

from litgpt_whittle.data.loading import connect, split_batch, train_loader, val_loader
from litgpt_whittle.errors import UserError
from litgpt_whittle.processes import Termination, all_reduce_sum, barrier, release_memory
from litgpt_whittle.tensors import IGNORE_INDEX, in_sums_dtype, sums_dtype
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.training.data_stream import skipping
from litgpt_whittle.training.log import TrainLog
from litgpt_whittle.training.resume import find_resume
from litgpt_whittle.training.run import Run, Score
from litgpt_whittle.training.validation import ValidationBatches


def load_data(
    fabric: L.Fabric, data: DataModule, tokenizer_dir: Path | None, batch_size: int, seq_length: int, n_val: int
) -> tuple[Any, ValidationBatches | None]:
    """Connect a data module and return its training dataloader and its first `n_val` validation batches.

    Raises:
        UserError: If the training or the validation data does not fill one batch.
    """
    connect(data, tokenizer_dir, batch_size, seq_length)
    loaders = train_loader(data), val_loader(data)
    for name, loader in zip(("training", "validation"), loaders):
        if loader is not None and hasattr(loader, "__len__") and len(loader) == 0:
            raise UserError(
                f"the {name} data must fill at least one batch of {batch_size} samples of {seq_length + 1} tokens; "
                "add data, or lower train.micro_batch_size or train.max_seq_length"
            )
    # `DataStream` and `shared_batches` divide the batches among the processes
    if loaders[1] is None:
        return skipping(loaders[0]), None
    shares = fabric.global_rank, fabric.world_size
    return skipping(loaders[0]), ValidationBatches(loaders[1], lambda: val_loader(data), n_val, *shares)


def fit(run: Run, train: TrainArgs, eval: EvalArgs) -> None:
    """Train until max_tokens, max_steps or max_time, whichever comes first, and save the final checkpoint.

    Raises:
        UserError: If a loss is not finite (unless `train.skip_nan`), or a checkpoint cannot be written.
        SystemExit: After SIGTERM, once the run's state is saved.
    """
    fabric, schedule, progress = run.fabric, run.schedule, run.progress
    log = TrainLog(run, train.log_interval)
    if run.job.text_bytes is not None and run.validation is not None:
        log.bytes_per_token = validate(run, run.job.text_bytes)
    _first_validation(run, log, eval)
    log.start_clock()
    started, seconds_before = time.perf_counter(), progress.seconds
    with Termination() as termination:
        while progress.iter_num < schedule.max_iters:
            # broadcast, because the clocks of several processes differ
            if train.max_time is not None and fabric.broadcast(progress.seconds) >= train.max_time:
                fabric.print(f"Stopping after {progress.seconds:.0f} s: train.max_time is {train.max_time:.0f} s")
                break
            loss, begin = torch.zeros((), device=fabric.device), run.stream.position
            n_iters = min(schedule.accumulation, schedule.max_iters - progress.iter_num)
            batches = [next(run.stream) for _ in range(n_iters)]
            for batch, n_tokens, divisor in zip(batches, *_weights(run, batches)):
                scalars = _micro_step(run, batch, divisor)
                loss = loss + scalars["loss"]
                log.add(scalars, n_tokens / schedule.tokens_per_iter)
            stepped = progress.iter_num % schedule.accumulation == 0
            if stepped:
                _optimizer_step(run, train, loss, begin)
            progress.seconds = seconds_before + time.perf_counter() - started
            log.train_step()
            if stepped and run.validation is not None and progress.step_count % eval.interval == 0:
                with log.paused():
                    _validate(run, log)
                    run.validation.draw()
            is_due = train.save_interval is not None and progress.step_count % train.save_interval == 0
            must_stop = stepped and termination.agreed(fabric)
            if stepped and (is_due or must_stop):
                with log.paused():
                    _save(run, run.out_dir / f"step-{progress.step_count:08d}")
            if must_stop:
                fabric.print(f"Stopped by SIGTERM after step {progress.step_count}; continue with --resume auto")
                raise SystemExit(128 + signal.SIGTERM if fabric.global_rank == 0 else 0)
    if eval.final_validation and run.validation is not None:
        _validate(run, log, final=True)
    _save(run, run.out_dir / "final", is_final=True)
    log.finish()


def _weights(run: Run, batches: list[Any]) -> tuple[list[int], list[float]]:
    """Return the number of counted tokens of each micro-batch in a step, and the divisor of its mean loss.

    A token counts if its label is not `IGNORE_INDEX`. With these divisors, the step's gradient is that of the mean loss
    over all counted tokens on all processes. If all micro-batches have equally many counted tokens, the divisor is the
    number of micro-batches, as in `litgpt pretrain`.
    """
    counts = [int((split_batch(batch, run.seq_length)[1] != IGNORE_INDEX).sum()) for batch in batches]
    total, n_processes = sum(counts), run.fabric.world_size
    if n_processes > 1:
        total = int(all_reduce_sum(torch.tensor(total, device=run.fabric.device)))
    return counts, [total / (n_processes * count) if count else math.inf for count in counts]


def _micro_step(run: Run, batch: Any, divisor: float) -> dict[str, torch.Tensor]:
    """Accumulate the gradients of one micro-batch's mean loss divided by `divisor`; return the scalars to log."""
    fabric, job, schedule = run.fabric, run.job, run.schedule
    for group in job.optimizer.param_groups:
        group["lr"] = schedule.lr(run.progress.iter_num)
    run.progress.iter_num += 1
    batch = split_batch(batch, run.seq_length)
    if job.look_up is not None:
        job.look_up(batch[0])
    input_ids, targets = fabric.to_device(batch)
    is_accumulating = run.progress.iter_num % schedule.accumulation != 0
    with fabric.no_backward_sync(job.module, enabled=is_accumulating):
        done = (run.progress.iter_num - 1) / schedule.max_iters
        scalars = job.step(input_ids, targets, lambda loss: fabric.backward(loss / divisor), done)
    return {name: value.detach() for name, value in scalars.items()}


def _optimizer_step(run: Run, train: TrainArgs, loss: torch.Tensor, begin: str) -> None:
    """Update the weights if the loss, and with `train.max_norm` also the gradient, is finite on all processes."""
    fabric, job, progress = run.fabric, run.job, run.progress
    if train.max_norm is not None:
        norm = fabric.clip_gradients(job.module, job.optimizer, max_norm=train.max_norm, error_if_nonfinite=False)
        loss = loss + (norm.full_tensor() if isinstance(norm, DTensor) else cast(torch.Tensor, norm))
    progress.step_count += 1
    if all_reduce_sum(loss.float()).isfinite():
        job.optimizer.step()
    elif train.skip_nan:
        progress.n_skipped += 1
        fabric.print(
            f"step {progress.step_count} skipped, its loss or gradient is not finite ({progress.n_skipped} so far)"
        )
    else:
        raise UserError(
            f"the loss or a gradient is not finite at step {progress.step_count} ({begin} to {run.stream.position}); "
            f"{_last_good(run)}; lower the learning rate, or skip such steps with --train.skip_nan true"
        )
    job.optimizer.zero_grad()


def _last_good(run: Run) -> str:
    """Describe the latest checkpoint for error messages."""
    folder = find_resume("auto", run.out_dir)
    return "there is no checkpoint yet" if folder is None else f"the last good checkpoint is {str(folder)!r}"


def _save(run: Run, folder: Path, is_final: bool = False) -> None:
    """Save a checkpoint on all processes.

    Raises:
        UserError: If it cannot be written, such as on a full disk.
    """
    run.fabric.print(f"Saving checkpoint to {str(folder)!r}")
    state = run.training_state()
    try:
        run.job.save(folder, state, is_final)
    except OSError as error:
        raise UserError(
            f"{str(folder)!r} could not be written ({str(error).splitlines()[0][:80]}); {_last_good(run)}; make room "
            "and continue with --resume auto"
        ) from None
    barrier()


def _first_validation(run: Run, log: TrainLog, eval: EvalArgs) -> None:
    """Validate the teacher, then the model, before training begins, so that errors in validation appear early.

    A resumed run skips this. Unless `eval.initial_validation` is set, the model is scored on two batches only.
    """
    teacher_score, run.job.teacher_score = run.job.teacher_score, None
    if run.validation is None or run.progress.iter_num > 0:
        return
    if teacher_score is not None:
        log.teacher_validation(validate(run, teacher_score))
        del teacher_score  # frees a teacher that training does not use
        release_memory()
    if eval.initial_validation:
        _validate(run, log)
    else:
        validate(run, run.job.score, only=2)
    run.validation.draw()


def _validate(run: Run, log: TrainLog, final: bool = False) -> None:
    """Compute the validation losses of the model and of the job's further models, and log them."""
    more = {name: validate(run, score) for name, score in run.job.more_scores.items()}
    log.validation(validate(run, run.job.score), more, final)


@torch.no_grad()
def validate(run: Run, score: Score, only: int | None = None) -> float:
    """Return the mean cross-entropy in nats over all tokens of the validation batches.

    The batches are the same at every call, and the global random state does not change.

    Args:
        run: The run.
        score: Returns a batch's mean cross-entropy.
        only: Maximum number of batches to score on each process; by default all.

    Raises:
        UserError: If there is no batch, or if no token has a label.
    """
    assert run.validation is not None, "there is no validation data"
    barrier()
    run.job.module.eval()
    total = torch.zeros((), dtype=sums_dtype(run.fabric.device), device=run.fabric.device)
    n_tokens, n_batches = torch.zeros_like(total), torch.zeros_like(total)
    for batch, counts in islice(run.validation, only):
        input_ids, targets = split_batch(run.fabric.to_device(batch), run.seq_length)
        loss, n = score(input_ids, targets), (targets != IGNORE_INDEX).sum()
        if counts:
            total += in_sums_dtype(loss) * n
            n_tokens += n
            n_batches += 1
    run.job.module.train()
    total, n_tokens, n_batches = map(all_reduce_sum, (total, n_tokens, n_batches))
    if n_batches == 0:
        raise UserError("the validation data must fill at least one batch, got none; add data or raise eval.max_iters")
    if n_tokens == 0:
        raise UserError(
            f"the validation data must have labels that count, and all those of the first {int(n_batches)} batches are "
            "masked; raise train.max_seq_length, so that samples keep their answers, or choose other data"
        )
    return (total / n_tokens).item()
