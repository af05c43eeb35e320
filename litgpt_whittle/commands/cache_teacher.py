"""`litgpt cache_teacher`: precompute a teacher's outputs on a corpus for offline distillation of many students."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import Namespace
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir, init_out_dir, save_config

import litgpt_whittle.data  # noqa: F401  lets the command line find HFText by its bare name
from litgpt_whittle.batches import BatchArgs, check_seed
from litgpt_whittle.checkpoint import HF_CONFIG, check_checkpoint, read_weights, weights_fingerprint
from litgpt_whittle.data.loading import check_data, connect, train_loader
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.cache import INDEX, Contents, Index, differences, shard_path
from litgpt_whittle.distillation.codecs import make_codec, with_settings
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_writable, readable_size
from litgpt_whittle.hints import try_next
from litgpt_whittle.processes import launch, lock_dir_for_all, n_devices, on_rank_zero, rank, shutdown, world_size
from litgpt_whittle.quantities import parse_amount
from litgpt_whittle.settings import (
    describe,
    flatten,
)
from litgpt_whittle.tokenizer_files import (
    copy_contents,
    copy_tokenizer,
)
from litgpt_whittle.training.caching import (
    Pass,
    whole_pass,
    write_cache,
)
from litgpt_whittle.training.teacher import LiveTeacher


@dataclass
class WindowArgs(BatchArgs):
    """Micro batch size and sequence length for the teacher"""

    max_seq_length: int | None = None
    """Length of samples, the same as in ``litgpt distill``; by default the teacher's block size"""


def setup(
    checkpoint_dir: Path,
    data: DataModule | None = None,
    out_dir: Path = Path("out/teacher_cache"),
    codec: str | dict[str, dict[str, Any]] = "sampled",
    temperature: float = DistillArgs.temperature,  # type: ignore[assignment]
    train: WindowArgs = WindowArgs(),
    max_tokens: int | None = None,
    precision: Literal["bf16-true", "16-true", "32-true", None] = None,
    devices: int | str = 1,
    teacher_placement: Literal["replicated", "sharded"] = "replicated",
    shard_size: str = "64MB",
    resume: bool = False,
    seed: int = 42,
) -> None:
    """Precompute a teacher's outputs on a corpus for offline distillation.

    Train with ``litgpt distill --teacher_cache``, with the same data, tokenizer and ``train.max_seq_length``.

    Arguments:
        checkpoint_dir: The teacher's checkpoint directory.
        data: The students' training data: the training split of any litgpt data module, or
            ``--data HFText --data.path PATH``.
        out_dir: Directory of the cache.
        codec: Encoding of the teacher's predictions, by its name in ``litgpt_whittle.codecs``, or the name with
            settings: ``sampled``, 12 random draws, unbiased (``{sampled: {draws: 12}}``); ``top_k``, the most likely
            tokens and the mass of all others (``{top_k: {k: 64}}``); ``full``, all logits.
        temperature: Divisor of the logits before the softmax; the same as the students' ``distill.temperature``. The
            codec ``full`` serves any temperature.
        train: Micro batch size and sequence length for the teacher.
        max_tokens: Cache only the first tokens of training, up to this number; by default all.
        precision: The precision to compute in. By default bf16-true on a GPU, 32-true elsewhere.
        devices: Devices that share the work: GPUs, or processes on a CPU's cores. The cache does not depend on their
            number.
        teacher_placement: ``replicated``: each device holds the teacher. ``sharded``: the devices hold a part of it
            each (FSDP2), for a teacher that does not fit in one device's memory.
        shard_size: Size of a cache file; an interruption loses at most the unfinished file.
        resume: Continue the cache in ``out_dir``. All other settings must be the same.
        seed: Seed of the random draws and of the data order.
    """
    checkpoint_dir, out_dir = extend_checkpoint_dir(Path(checkpoint_dir)), init_out_dir(out_dir)
    contents = check(Namespace(**locals()))
    check_writable(out_dir)
    teacher, length = check_checkpoint(checkpoint_dir), contents.max_seq_length
    with lock_dir_for_all(out_dir):
        index = _begin(out_dir, contents, resume)
        fabric = launch(n_devices(devices))
        L.seed_everything(seed, verbose=False)
        connect(data, checkpoint_dir, train.micro_batch_size, length)
        whole = whole_pass(train_loader(data))
        on_rank_zero(lambda: _check_pass(whole, max_tokens, type(data).__name__))
        begin = partial(_write_index, out_dir, index, checkpoint_dir, teacher)
        dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(contents.precision, torch.float32)
        is_sharded = teacher_placement == "sharded"
        live = LiveTeacher(checkpoint_dir, length, dtype, fabric.device, is_sharded)
        index = write_cache(out_dir, index, live, whole, fabric.device, rank() == 0, is_sharded, begin)
        if shutdown():
            print(summary(out_dir, index))


def check(args: Namespace) -> Contents:
    """Run the checks that take no time; `litgpt whittle` runs them before its first stage.

    Args:
        args: The command's arguments, by name.

    Returns:
        Settings that determine the cache's contents.

    Raises:
        UserError: For the first invalid setting.
    """
    _check_numbers(args.data, args.temperature, args.max_tokens, args.seed)
    teacher, length = check_checkpoint(args.checkpoint_dir), args.train.max_seq_length
    if (length := length or teacher.block_size) > teacher.block_size:
        raise UserError(
            f"train.max_seq_length must be at most the teacher's block_size {teacher.block_size}, got {length}; "
            "lower it"
        )
    if n_devices(args.devices) == 1 and args.teacher_placement == "sharded":
        raise UserError("teacher_placement sharded needs several devices, got 1; raise --devices, or leave it out")
    gives = make_codec(args.codec, teacher.padded_vocab_size, args.temperature).gives
    read_weights(args.checkpoint_dir)  # damaged weights fail before the data is read
    check_data(args.data, args.checkpoint_dir, teacher.padded_vocab_size)
    return Contents(
        teacher=teacher.name,
        weights=weights_fingerprint(args.checkpoint_dir),
        vocab_size=teacher.padded_vocab_size,
        codec=with_settings(args.codec),
        temperature=None if gives == "logits" else float(args.temperature),
        seed=args.seed,
        precision=args.precision or ("bf16-true" if torch.cuda.is_available() else "32-true"),
        max_seq_length=length,
        max_tokens=args.max_tokens,
        micro_batch_size=args.train.micro_batch_size,
        shard_bytes=int(parse_amount(args.shard_size, "bytes")),
        data=_described(args.data),
    )


def _check_numbers(data: DataModule | None, temperature: float, max_tokens: int | None, seed: int) -> None:
    if data is None:
        raise UserError("data must be chosen; for example --data HFText --data.path PATH")
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature must be above 0, got {temperature}; {DistillArgs.temperature} is distill's")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, got {max_tokens}; leave it out for all")
    check_seed(seed)


def _check_pass(whole: Pass, max_tokens: int | None, name: str) -> None:
    if max_tokens is not None and not whole.begins_alike:
        raise UserError(
            f"max_tokens needs data whose order depends on its seed alone, such as HFText, got {max_tokens} for "
            f"{name}, which shuffles at random; leave max_tokens out, or give the data module less data"
        )
    if whole.n_windows is None and world_size() > 1:
        raise UserError(
            f"several devices need data that can be read at any place, got {world_size()} for the stream of {name}; "
            "use --devices 1"
        )


def _described(data: DataModule) -> dict[str, Any]:
    """Return the data module's class and settings, without the number of workers, which does not change the data."""
    settings = flatten(describe(data))
    settings.pop("init_args.num_workers", None)
    return settings


def _begin(out_dir: Path, contents: Contents, resume: bool) -> Index:
    """Return a new index, or the existing one when resuming.

    Raises:
        UserError: If there is no cache to resume, `out_dir` is not empty without `resume`, or the existing cache has
            other contents.
    """
    if not (out_dir / INDEX).is_file():
        if resume:
            raise UserError(f"there is nothing to resume in out_dir {str(out_dir)!r}; leave --resume out to begin")
        if out_dir.is_dir() and any(not path.name.startswith(".") for path in out_dir.iterdir()):
            raise UserError(f"out_dir must be empty or new, got {str(out_dir)!r}; choose another")
        return Index(contents)
    if not resume:
        raise UserError(
            f"{str(out_dir)!r} holds a cache already; continue it with --resume true or choose another out_dir"
        )
    index = Index.read(out_dir)
    if differ := differences(index.contents, contents):
        raise UserError(
            f"a resumed cache must keep its settings: {', '.join(differ)}; change back or choose another out_dir"
        )
    return index


def _write_index(out_dir: Path, index: Index, checkpoint_dir: Path, teacher: Config) -> None:
    """Write the index, and the teacher's config and tokenizer, against which students are checked."""
    out_dir.mkdir(parents=True, exist_ok=True)
    index.write(out_dir)
    copy_tokenizer(checkpoint_dir, out_dir)
    if (checkpoint_dir / HF_CONFIG).is_file():
        copy_contents(checkpoint_dir / HF_CONFIG, out_dir / HF_CONFIG)
    save_config(teacher, out_dir)


def summary(out_dir: Path, index: Index) -> str:
    """Return a readable summary of the cache."""
    n_windows = sum(shard.n_windows for shard in index.shards)
    n_bytes = sum(shard_path(out_dir, i).stat().st_size for i in range(len(index.shards)))
    assert index.length is not None, "the cache is empty"
    n_tokens = n_windows * index.length
    ((codec, settings),) = index.contents.codec.items()
    shown = ", ".join(f"{name} {value}" for name, value in settings.items())
    temperature = index.contents.temperature
    flags = [] if temperature is None else ["--distill.temperature", temperature]
    return "\n".join(
        [
            f"Cached {index.contents.teacher} with {codec}{f' ({shown})' if shown else ''}:",
            f"  {n_tokens:,} tokens in {n_windows:,} different windows of {index.length}",
            f"  {n_bytes / n_tokens:.2f} bytes per token, {readable_size(n_bytes)} in {len(index.shards)} shards",
            f"The cache is in {out_dir}. {try_next('distill', '--teacher_cache', out_dir, *flags)}",
        ]
    )
