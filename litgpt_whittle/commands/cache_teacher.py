"""`litgpt cache_teacher`: precompute a teacher's outputs on a corpus for offline distillation of many students."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import lightning as L
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir, init_out_dir, save_config

import litgpt_whittle.data  # noqa: F401  lets the command line find HFText by its bare name
from litgpt_whittle.batches import BatchArgs
from litgpt_whittle.checkpoint import HF_CONFIG, check_checkpoint, read_weights, weights_fingerprint
from litgpt_whittle.command_config import CommandConfig, Result, as_command
from litgpt_whittle.data.loading import check_data, connect, packing_of, train_loader
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.cache import INDEX, Contents, Index, shard_path
from litgpt_whittle.distillation.codecs import make_codec, with_settings
from litgpt_whittle.document_masks import reset_attention
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_writable, readable_size
from litgpt_whittle.hints import try_next
from litgpt_whittle.manifest import check_unchanged
from litgpt_whittle.processes import launch, lock_dir_for_all, n_devices, on_rank_zero, rank, shutdown, world_size
from litgpt_whittle.quantities import parse_amount
from litgpt_whittle.setting_checks import check_seed
from litgpt_whittle.settings import (
    describe,
    flatten,
)
from litgpt_whittle.tensors import default_precision, weights_dtype
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
    """Tokens per sample; must equal ``train.max_seq_length`` of ``litgpt distill``. Default: teacher's block size"""


@dataclass
class CacheTeacherConfig(CommandConfig):
    """Precompute a teacher's outputs on a corpus for offline distillation.

    Train with ``litgpt distill --teacher_cache``, with the same data, tokenizer and ``train.max_seq_length``.
    """

    FREE: ClassVar[frozenset[str]] = frozenset(
        ("out_dir", "resume", "devices", "teacher_placement", "data.init_args.num_workers")
    )

    checkpoint_dir: Path
    """The teacher's checkpoint directory."""
    data: DataModule | None = None
    """The students' training data: the training split of any litgpt data module, or
    ``--data HFText --data.path PATH``."""
    out_dir: Path = Path("out/teacher_cache")
    """Directory of the cache."""
    codec: str | dict[str, dict[str, Any]] = "sampled"
    """Encoding of the teacher's predictions, by its name in ``litgpt_whittle.codecs``, or the name with settings:
    ``sampled``, 12 random draws per token, unbiased (``{sampled: {draws: 12}}``); ``top_k``, the most likely tokens
    and the total probability of all others (``{top_k: {k: 64}}``); ``full``, all logits."""
    temperature: float = DistillArgs.temperature  # type: ignore[assignment]
    """Divisor of the logits before the softmax; must equal the students' ``distill.temperature``, unless the codec is
    ``full``."""
    train: WindowArgs = field(default_factory=WindowArgs)
    """Micro batch size and sequence length for the teacher."""
    max_tokens: int | None = None
    """Maximum number of tokens to cache, from the start of training; by default all."""
    precision: Literal["bf16-true", "16-true", "32-true", None] = None
    """The precision to compute in. By default bf16-true on a GPU, 32-true elsewhere."""
    devices: int | str = 1
    """Devices that share the work: GPUs, or processes on a CPU's cores. The cache does not depend on their number."""
    teacher_placement: Literal["replicated", "sharded"] = "replicated"
    """``replicated``: each device holds the teacher. ``sharded``: each device holds a part of it (FSDP2), for a
    teacher that does not fit in one device's memory."""
    shard_size: str = "64MB"
    """Size of a cache file; an interruption loses at most the unfinished file."""
    resume: bool = False
    """Continue the cache in ``out_dir``. All other settings must be the same."""
    seed: int = 42
    """Seed of the random draws and of the data order."""

    def __post_init__(self) -> None:
        self.checkpoint_dir, self.out_dir = extend_checkpoint_dir(Path(self.checkpoint_dir)), init_out_dir(self.out_dir)

    def validate(self) -> None:
        if self.data is None:
            raise UserError("data must be chosen; for example --data HFText --data.path PATH")
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"temperature must be above 0, got {self.temperature}; {DistillArgs.temperature} is the default"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {self.max_tokens}; leave it out to cache all")
        check_seed(self.seed)
        teacher = check_checkpoint(self.checkpoint_dir)
        if self.length > teacher.block_size:
            raise UserError(
                f"train.max_seq_length must be at most the teacher's block_size {teacher.block_size}, got "
                f"{self.length}; lower it"
            )
        if n_devices(self.devices) == 1 and self.teacher_placement == "sharded":
            raise UserError("teacher_placement sharded needs several devices, got 1; raise --devices, or leave it out")
        _ = self.contents  # raises for an invalid codec or damaged weights, before the data is read
        check_data(self.data, self.checkpoint_dir, teacher.padded_vocab_size, can_reset_attention=True)

    @property
    def length(self) -> int:
        """Tokens per sample."""
        return self.train.max_seq_length or check_checkpoint(self.checkpoint_dir).block_size

    @property
    def contents(self) -> Contents:
        """Settings that determine the cache's contents.

        Raises:
            UserError: If the codec is unknown or does not accept a setting, or the teacher's weights are damaged.
        """
        teacher = check_checkpoint(self.checkpoint_dir)
        gives = make_codec(self.codec, teacher.padded_vocab_size, self.temperature).gives
        read_weights(self.checkpoint_dir)
        return Contents(
            teacher=teacher.name,
            weights=weights_fingerprint(self.checkpoint_dir),
            vocab_size=teacher.padded_vocab_size,
            codec=with_settings(self.codec),
            temperature=None if gives == "logits" else float(self.temperature),
            seed=self.seed,
            precision=self.precision or default_precision(),
            max_seq_length=self.length,
            max_tokens=self.max_tokens,
            micro_batch_size=self.train.micro_batch_size,
            shard_bytes=int(parse_amount(self.shard_size, "bytes")),
            data=_described(cast(DataModule, self.data)),
        )

    def run(self) -> Result | None:
        """Cache the teacher's outputs.

        Returns:
            The cache; None on all processes but the first.

        Raises:
            UserError: For the first invalid argument, before anything expensive starts.
        """
        self.validate()
        check_writable(self.out_dir)
        assert self.data is not None, "validate has checked it"
        contents, teacher = self.contents, check_checkpoint(self.checkpoint_dir)
        with lock_dir_for_all(self.out_dir):
            index = _begin(self.out_dir, contents, self.resume)
            fabric = launch(n_devices(self.devices))
            L.seed_everything(self.seed, verbose=False)
            connect(self.data, self.checkpoint_dir, self.train.micro_batch_size, self.length)
            whole = whole_pass(train_loader(self.data))
            on_rank_zero(lambda: _check_pass(whole, self.max_tokens, type(self.data).__name__))
            begin = partial(_write_index, self.out_dir, index, self.checkpoint_dir, teacher)
            dtype = weights_dtype(contents.precision)
            is_sharded = self.teacher_placement == "sharded"
            live = LiveTeacher(self.checkpoint_dir, self.length, dtype, fabric.device, is_sharded)
            reset_attention(live.model, packing_of(self.data, self.checkpoint_dir))
            index = write_cache(self.out_dir, index, live, whole, fabric.device, rank() == 0, is_sharded, begin)
            if not shutdown():
                return None
            return Result(self.out_dir, summary=summary(self.out_dir, index))


setup = as_command(CacheTeacherConfig)


def _check_pass(whole: Pass, max_tokens: int | None, name: str) -> None:
    if max_tokens is not None and not whole.begins_alike:
        raise UserError(
            f"{name} shuffles at random, and max_tokens needs data whose order depends on its seed alone, such as "
            f"HFText, got max_tokens {max_tokens}; leave it out, or give the data module less data"
        )
    if whole.n_windows is None and world_size() > 1:
        raise UserError(
            f"{name} is a stream, which several devices cannot share, got {world_size()} devices; use --devices 1"
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
    check_unchanged("a resumed cache", asdict(index.contents), asdict(contents), "choose another out_dir")
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
