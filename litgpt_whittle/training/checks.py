"""Checks that run before training starts anything expensive; invalid input raises a one-line error."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.loggers import Logger
from litgpt import Tokenizer
from litgpt.args import EvalArgs, LogArgs
from litgpt.config import Config
from litgpt.data import DataModule, TinyLlama
from litgpt.utils import choose_logger, instantiate_torch_optimizer

from litgpt_whittle.checkpoint import weights_fingerprint
from litgpt_whittle.distillation.args import (
    DistillArgs,
    HiddenArgs,
)
from litgpt_whittle.distillation.cache import Cache, Contents
from litgpt_whittle.distillation.objective import Term, check_losses
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import from_yaml
from litgpt_whittle.processes import n_devices
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.training.args import TrainArgs
from litgpt_whittle.vocabulary.kept import KeptTokens


def check_arguments(
    train: TrainArgs,
    eval: EvalArgs,
    initial_checkpoint_dir: Path | None,
    resume: bool | Literal["auto"] | Path,
) -> None:
    """Check that the training loop supports the arguments, and that they do not contradict each other.

    Raises:
        UserError: For the first invalid argument.
    """
    if train.epochs is not None:
        raise UserError(f"train.epochs is not supported, got {train.epochs}; set train.max_tokens or train.max_steps")
    if eval.max_new_tokens is not None:
        raise UserError(f"eval.max_new_tokens is not supported, got {eval.max_new_tokens}; leave it out")
    if train.max_tokens is None and train.max_steps is None:
        raise UserError("training has no end; set train.max_tokens or train.max_steps")
    counts = {
        "train.micro_batch_size": train.micro_batch_size,
        "train.global_batch_size": train.global_batch_size,
        "train.log_interval": train.log_interval,
        "train.save_interval": train.save_interval,
        "train.max_seq_length": train.max_seq_length,
        "eval.interval": eval.interval,
        "eval.max_iters": eval.max_iters,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name} must be 1 or more, got {count}; raise it")
    if initial_checkpoint_dir is not None and resume and resume != "auto":
        raise UserError(
            "resume and initial_checkpoint_dir must not both be set, as a resumed run continues from its own weights; "
            "set only one, or use --resume auto, which starts from initial_checkpoint_dir if nothing can be resumed"
        )


def read_optimizer(optimizer: str | dict) -> str | dict:
    """Return the optimizer with settings such as `--optimizer.lr` moved into `init_args`.

    The parser puts them next to `init_args`, where litgpt ignores them.

    Raises:
        UserError: If the optimizer cannot be instantiated.
    """
    if isinstance(optimizer, dict):
        beside = {name: value for name, value in optimizer.items() if name not in ("class_path", "init_args")}
        if "class_path" not in optimizer:
            given = ", ".join(map(repr, optimizer)) or "no settings"
            raise UserError(
                f"optimizer needs a class_path, got {given}; add one such as --optimizer.class_path torch.optim.AdamW"
            )
        beside = {name.removeprefix("init_args."): _as_value(value) for name, value in beside.items()}
        inside = {**(optimizer.get("init_args") or {}), **beside}
        optimizer = {"class_path": optimizer["class_path"], "init_args": inside}
    try:
        # a copy, because litgpt modifies the settings
        instantiate_torch_optimizer(copy.deepcopy(optimizer), [torch.nn.Parameter(torch.zeros(2, 2))])
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"optimizer {optimizer!r} cannot be created ({reason}); change its settings, or name another such as AdamW"
        ) from None
    return optimizer


def _as_value(text: Any) -> Any:
    """Parse a flag's text as YAML; other values are returned unchanged."""
    return from_yaml(text) if isinstance(text, str) else text


def check_devices(devices: int | str, num_nodes: int, train: TrainArgs) -> int:
    """Return the number of devices to train on.

    Raises:
        UserError: If fewer devices are available, if they cannot share a batch evenly, or if the machines cannot find
            each other.
    """
    devices = n_devices(devices)
    samples = train.micro_batch_size * devices * num_nodes
    if train.global_batch_size % samples:
        raise UserError(
            "train.global_batch_size must be a multiple of train.micro_batch_size times devices times num_nodes, got "
            f"{train.global_batch_size} and {train.micro_batch_size} * {devices} * {num_nodes}; change it to "
            f"{max(1, round(train.global_batch_size / samples)) * samples}"
        )
    # SLURM and torchrun set these variables; NODE_RANK is set by hand
    if num_nodes > 1 and not any(name in os.environ for name in ("SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "NODE_RANK")):
        raise UserError(
            f"num_nodes = {num_nodes} needs every machine to know its rank; start each with torchrun or by SLURM, or "
            "set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    return devices


def check_pair(student: Config, teacher: Config | None, max_seq_length: int | None) -> int:
    """Return the sequence length to train on: `max_seq_length`, or the student's block size.

    Args:
        student: The student's config.
        teacher: The teacher's config, if a teacher is used.
        max_seq_length: The requested length, if any.

    Raises:
        UserError: If the length exceeds the block size of the student or the teacher.
    """
    seq_length = max_seq_length or student.block_size
    for name, config in (("student", student), ("teacher", teacher)):
        if config is not None and seq_length > config.block_size:
            raise UserError(
                f"train.max_seq_length must be at most the {name}'s block_size {config.block_size}, got {seq_length}; "
                "lower it"
            )
    return seq_length


def check_vocabularies(student: Config, teacher: Config | None, own_dir: Path | None, teacher_dir: Path | None) -> None:
    """Check that the padded vocabularies have the same size, or belong to the same tokenizer.

    Args:
        student: The student's config.
        teacher: The teacher's config, if a teacher is used.
        own_dir: Directory of the student's tokenizer; `None` for a new model, which uses the teacher's tokenizer.
        teacher_dir: Directory of the teacher's tokenizer; call `check_tokenizers` first, to compare the tokenizers.

    Raises:
        UserError: If the tokenizers cannot be compared, or if a token has no row in one of the vocabularies.
    """
    if teacher is None or student.padded_vocab_size == teacher.padded_vocab_size:
        return
    n = min(student.padded_vocab_size, teacher.padded_vocab_size)
    sizes = (
        "teacher and student must have the same number of vocabulary entries, or the same tokenizer, got "
        f"{teacher.padded_vocab_size} and {student.padded_vocab_size} entries"
    )
    assert teacher_dir is not None, "a teacher comes with a directory"
    folders = [teacher_dir if own_dir is None else own_dir, teacher_dir]
    known = [_vocabulary(folder) for folder in folders]
    for folder, vocabulary in zip(folders, known):
        if vocabulary is None:
            raise UserError(f"{sizes}, and {str(folder)!r} has no tokenizer to compare; copy one there")
    if type(known[0]) is not type(known[1]):
        raise UserError(
            f"{sizes}, and a tokenizer.json cannot be compared with a tokenizer.model; have the same kind of file in "
            f"{str(folders[0])!r} and {str(folders[1])!r}"
        )
    tokens = known[0] if isinstance(known[0], dict) else {"the last": Tokenizer(teacher_dir).vocab_size - 1}
    token = max(tokens, key=tokens.__getitem__)
    if tokens[token] >= n:
        raise UserError(
            f"{sizes}, and the token {token!r} with id {tokens[token]} is missing from one of them; choose other models"
        )


def warn_of_small_teacher(ours: int, theirs: int) -> None:
    """Warn if the teacher does not have more parameters than the student, for instance because the two are swapped.

    Args:
        ours: Number of the student's parameters.
        theirs: Number of the teacher's parameters.
    """
    if theirs <= ours:
        warnings.warn(
            f"the teacher has {theirs:,} parameters, no more than the student's {ours:,}; if the two are swapped, swap "
            "--initial_checkpoint_dir and --teacher_checkpoint_dir",
            stacklevel=2,
        )


def check_tokenizers(tokenizer_dir: Path | None, student_dir: Path | None, teacher_dir: Path | None) -> Path | None:
    """Return the first directory that has a tokenizer: `tokenizer_dir`, the student's or the teacher's.

    Raises:
        UserError: If `tokenizer_dir` has no tokenizer, or if the tokenizers in the directories differ.
    """
    if tokenizer_dir is not None and _vocabulary(tokenizer_dir) is None:
        raise UserError(
            f"tokenizer_dir must contain a tokenizer.json or tokenizer.model, got {str(tokenizer_dir)!r}; change it"
        )
    known: dict[Path, dict | bytes] = {}
    for folder in (tokenizer_dir, student_dir, teacher_dir):
        if folder is not None and (found := _vocabulary(folder)) is not None:
            known[folder] = found
    if not known:
        return None
    first = next(iter(known))
    for folder, vocabulary in known.items():
        # a tokenizer.json cannot be compared with a SentencePiece model
        if type(vocabulary) is type(known[first]) and vocabulary != known[first]:
            raise UserError(
                f"teacher and student must have the same tokenizer, those in {str(first)!r} and {str(folder)!r} "
                f"differ{_first_difference(known[first], vocabulary)}; {_remedy(first, folder)}"
            )
    return first


def _remedy(student_dir: Path, teacher_dir: Path) -> str:
    """Return advice for a teacher with another tokenizer than the student."""
    kept = KeptTokens.read(student_dir)
    if kept is None or not kept.belong_to(teacher_dir):
        return "choose a teacher with the student's tokenizer"
    return (
        "the student has a part of the teacher's tokens, so choose the teacher that litgpt prune_vocab wrote, or run "
        f"'litgpt prune_vocab {teacher_dir} --like {student_dir}'"
    )


def _first_difference(one: dict | bytes, other: dict | bytes) -> str:
    """Describe the differing token with the lowest id; empty for tokenizers that are not JSON."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return ""
    differing = [token for token in one | other if one.get(token) != other.get(token)]
    token = min(differing, key=lambda token: min(ids[token] for ids in (one, other) if token in ids))
    ids_of = [f"the id {ids[token]}" if token in ids else "no id" for ids in (one, other)]
    return f", first in the token {token!r}, which has {ids_of[0]} and {ids_of[1]}"


def _vocabulary(folder: Path) -> dict | bytes | None:
    """Return the token ids of a tokenizer.json, the bytes of a tokenizer.model, or None if there is neither file."""
    if (folder / "tokenizer.json").is_file():
        try:
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
            vocab = content["model"]["vocab"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{str(folder / 'tokenizer.json')!r} is not a tokenizer; fetch it again") from None
        # unigram models list [token, score] in id order
        pairs = vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        return pairs | added
    if (folder / "tokenizer.model").is_file():
        return (folder / "tokenizer.model").read_bytes()
    return None


def check_cache(
    contents: Contents,
    where: str,
    terms: Sequence[Term],
    distill: DistillArgs,
    max_seq_length: int,
    teacher_dir: Path | None,
) -> None:
    """Check that a teacher's cache fits the run.

    Args:
        contents: Settings that the cache was made with.
        where: Name of the cache in messages.
        terms: The losses.
        distill: The distillation objective.
        max_seq_length: The run's sequence length.
        teacher_dir: The teacher's checkpoint directory, if it is given in addition to the cache.

    Raises:
        UserError: If a loss needs more than the cache stores, or if window length, temperature or teacher differ.
    """
    temperature = distill.temperature
    if distill.hidden.is_used:
        raise UserError(
            f"distill.hidden needs the running teacher, but the {where} has only predictions; train with "
            "--teacher_checkpoint_dir instead, or leave distill.hidden out"
        )
    check_losses(terms, contents.make_codec().gives, where)
    if contents.temperature is not None and temperature != contents.temperature:
        raise UserError(
            f"distill.temperature must be {contents.temperature}, the temperature of the {where}, got "
            f"{temperature}; set --distill.temperature {contents.temperature}, or cache the teacher with another "
            "--temperature"
        )
    if max_seq_length != contents.max_seq_length:
        raise UserError(
            f"train.max_seq_length must be {contents.max_seq_length}, as for the {where}, got "
            f"{max_seq_length}; set --train.max_seq_length {contents.max_seq_length}"
        )
    if teacher_dir is not None and weights_fingerprint(teacher_dir) != contents.weights:
        raise UserError(
            f"teacher_checkpoint_dir must be the teacher of the {where}, {contents.teacher}, got "
            f"{str(teacher_dir)!r} with other weights; leave it out or choose the cache of this teacher"
        )


def check_cache_reaches(cache: Cache, n_tokens: int) -> None:
    """Check that the cache holds enough tokens for the training.

    Args:
        cache: The cache.
        n_tokens: Number of training tokens.

    Raises:
        UserError: If caching stopped at `max_tokens`, and the training takes more tokens than the cache has. A cache of
            all the data suffices for any number of epochs.
    """
    length = cache.index.length
    assert length is not None, "a cache that can be read has windows"
    asked, held = cache.contents.max_tokens, cache.n_windows * length
    if asked is not None and asked <= held < n_tokens:
        raise UserError(
            f"the cache {str(cache.folder)!r} must have the {n_tokens:,} tokens of the training, got {held:,}; "
            f"lower train.max_tokens, or cache the teacher with --max_tokens {n_tokens}"
        )


def check_resets(contents: Contents, where: str, resets: bool) -> None:
    """Check that a teacher's cache was made with the same masks between documents as the student has.

    Raises:
        UserError: If it was not.
    """
    cached = bool(contents.data.get("init_args.reset_attention", False))
    if cached != resets:
        raise UserError(
            f"data.reset_attention must be {str(cached).lower()}, as for the {where}, got {str(resets).lower()}; "
            "change it, or cache the teacher with the same setting"
        )


def check_hidden(
    args: HiddenArgs, n_layer: int, sub_network: Mapping[str, Any] | None, teacher: Config | None
) -> SubNet | None:
    """Return the student's sub-network, which maps its layers and channels to the teacher's; None if not needed.

    Args:
        args: The hidden-state loss.
        n_layer: Number of student layers.
        sub_network: Content of the student's `sub_network.yaml`, if it has one.
        teacher: The teacher's config.

    Raises:
        UserError: If a layer does not exist; or if the student was not extracted from this teacher and no projection is
            learned.
    """
    if not args.is_used:
        return None
    missing = [layer for layer in args.layers or () if not 0 <= layer < n_layer]
    if missing:
        raise UserError(
            f"distill.hidden.layers must be student layers from 0 to {n_layer - 1}, got {missing[0]}; leave it out "
            "to match all layers"
        )
    if args.projection:
        return None
    if sub_network is None:
        raise UserError(
            "distill.hidden needs the student's sub_network.yaml to match its channels to the teacher's, and there is "
            "none; add --distill.hidden.projection true to learn a projection instead"
        )
    return SubNet.from_saved(sub_network, teacher, "the student's sub_network.yaml")


def default_data() -> DataModule:
    """Return litgpt's default data module.

    Raises:
        UserError: If the package litdata, which this module needs, is not installed.
    """
    if importlib.util.find_spec("litdata") is None:
        raise UserError(
            "data must be chosen, the default TinyLlama needs the package litdata; use for example "
            "--data HFText --data.path PATH"
        )
    return TinyLlama()


def check_logger(logger_name: str) -> None:
    """Raise UserError if the logger is not installed; tensorboard, litgpt's default, needs no check (`make_logger`)."""
    if logger_name in ("wandb", "mlflow", "litlogger") and importlib.util.find_spec(logger_name) is None:
        raise UserError(f"{logger_name} is not installed; install it or use --logger_name csv")


def make_logger(logger_name: str, out_dir: Path, name: str, resume: bool, train: TrainArgs, log: LogArgs) -> Logger:
    """Return litgpt's logger of the given name; tensorboard, the default, falls back to csv if not installed."""

    def choose(logger_name: str) -> Logger:
        return choose_logger(
            logger_name, out_dir, name=name, resume=resume, log_interval=train.log_interval, log_args=asdict(log)
        )

    try:
        return choose(logger_name)
    except ModuleNotFoundError:
        if logger_name != "tensorboard":
            raise
    # tensorboard is litgpt's default and rarely chosen on purpose, so its absence should not end the run
    warnings.warn("tensorboard is not installed, logging to csv instead (--logger_name csv)", stacklevel=2)
    return choose("csv")
