"""Shared parts of the benchmarks that train students: teacher, text, litgpt commands, settings and losses."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_whittle import SubNet, n_params
from litgpt_whittle.data import HFText
from litgpt_whittle.distillation.cache import Index
from litgpt_whittle.journal import (
    JOURNAL,
    Evaluation,
    read_journal,
)
from litgpt_whittle.results import TrainingResult


class Data:
    """A teacher, the text that it was trained on, and held-out text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.teacher, self.train, self.validation = args.teacher, args.train, args.validation
        self.config = Config.from_checkpoint(self.teacher)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--teacher", type=Path, required=True, help="a litgpt checkpoint")
        parser.add_argument("--train", type=Path, required=True, help="text that the teacher was trained on")
        parser.add_argument("--validation", type=Path, required=True, help="text that the teacher was not trained on")

    def module(self, seed: int = 42) -> HFText:
        return HFText(path=str(self.train), val_path=str(self.validation), seed=seed)

    def flags(self, batch: int, seed: int = 42) -> list[str]:
        """Return the data flags of a litgpt command line."""
        flags = ["--data=HFText", f"--data.path={self.train}", f"--data.val_path={self.validation}"]
        return [*flags, f"--data.seed={seed}", f"--train.micro_batch_size={batch}"]


def litgpt(*arguments: str | Path) -> str:
    """Run a litgpt command and return its output; exit if it fails."""
    environment = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"} | os.environ
    command = [str(Path(sys.executable).with_name("litgpt")), *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\nlitgpt {arguments[0]} failed with exit code {done.returncode}")
    return done.stdout


def search(data: Data, out_dir: Path, iterations: int, *flags: str, size: int | None = None) -> list[Evaluation]:
    """Return the evaluations of `litgpt search` around a size, by default a third of the teacher's.

    Candidates are scored as plain cuts unless the flags set another fitness. An interrupted search resumes.
    """
    path = out_dir / JOURNAL
    n_done = len(read_journal(path)[1]) if path.is_file() else 0
    if n_done < iterations:
        size = size or n_params(data.config, SubNet.full(data.config)) // 3
        # all sizes, and the space of the existing figures
        figures = ("--search_space.convertible=false", "--space=coarse_layerwise")
        flags = (*figures, *data.flags(batch=4), f"--iterations={iterations}", *flags)
        flags = ("--fitness=perplexity", *flags, f"--out_dir={out_dir}")
        litgpt("search", data.teacher, f"--bin={size}±5%", f"--resume={str(n_done > 0).lower()}", *flags)
    return read_journal(path)[1][:iterations]


def train_settings(
    path: Path, data: Data, tokens: int, lr: float, every: int, seed: int = 42, config: Config | None = None
) -> Path:
    """Write the YAML of training without a teacher (`distill.beta` 0), from random weights if `config` is given."""
    settings = {
        "precision": "32-true",
        "logger_name": "csv",
        "compile": False,
        "seed": seed,
        "devices": 1,
        "resume": "auto",
        "tokenizer_dir": str(data.teacher),
        "data": {
            "class_path": "HFText",
            "init_args": {"path": str(data.train), "val_path": str(data.validation), "seed": seed},
        },
        "distill": {"beta": 0},
        "train": {
            "save_interval": 400,
            "log_interval": 50,
            "global_batch_size": 16,
            "micro_batch_size": 16,
            "max_tokens": tokens,
            "lr_warmup_steps": 20,
            "max_norm": 1.0,
            "min_lr": 1e-4,
        },
        "eval": {"interval": every, "max_iters": 1000, "initial_validation": True},
        "optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": lr, "weight_decay": 0.1, "betas": [0.9, 0.95]},
        },
    }
    if config is not None:
        settings["model_config"] = {k: v for k, v in vars(config).items() if k not in ("rope_n_elem", "norm_class")}
    path.write_text(yaml.safe_dump(settings))
    return path


CODECS = {"full": "full", "top_k": "{top_k: {k: 64}}", "sampled": "{sampled: {draws: 12}}"}


def cached(data: Data, folder: Path, codec: str, tokens: int, batch: int, seed: int) -> Path:
    """Return a teacher's cache of the training tokens, which follow from the seed."""
    is_begun = (folder / "index.json").is_file()
    if not is_begun or not Index.read(folder).complete:
        flags = [f"--codec={CODECS[codec]}", f"--max_tokens={tokens}", f"--resume={str(is_begun).lower()}"]
        flags += [*data.flags(batch, seed), f"--out_dir={folder}", "--precision=32-true"]
        litgpt("cache_teacher", data.teacher, *flags)
    return folder


@torch.inference_mode()
def validate(model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return a model's mean loss over batches, in nats per token, by PyTorch's own cross-entropy."""
    total = n = 0
    for ids, targets in batches:
        model.max_seq_length = ids.size(1)
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
        total, n = total + float(loss), n + int((targets != -100).sum())
    return total / n


def val_losses(out_dir: Path) -> list[tuple[int, float]]:
    """Return tokens and validation losses of a run, in order."""
    return TrainingResult(out_dir).curve
