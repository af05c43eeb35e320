"""What the benchmarks that train students share: the teacher with its text, litgpt's commands, settings, losses."""

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
    """A teacher, the text that it was trained on, and text that it was not."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.teacher, self.train, self.validation = args.teacher, args.train, args.validation
        self.config = Config.from_checkpoint(self.teacher)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--teacher", type=Path, required=True, help="a litgpt checkpoint")
        parser.add_argument("--train", type=Path, required=True, help="what it was trained on")
        parser.add_argument("--validation", type=Path, required=True, help="what it was not")

    def module(self, seed: int = 42) -> HFText:
        return HFText(path=str(self.train), val_path=str(self.validation), seed=seed)

    def flags(self, batch: int, seed: int = 42) -> list[str]:
        """The same for a command line."""
        flags = ["--data=HFText", f"--data.path={self.train}", f"--data.val_path={self.validation}"]
        return [*flags, f"--data.seed={seed}", f"--train.micro_batch_size={batch}"]


def litgpt(*arguments: str | Path) -> str:
    """Runs a litgpt command and gives what it printed; stops where it fails."""
    environment = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"} | os.environ
    command = [str(Path(sys.executable).with_name("litgpt")), *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\nlitgpt {arguments[0]} failed with exit code {done.returncode}")
    return done.stdout


def search(data: Data, out_dir: Path, iterations: int, *flags: str, size: int | None = None) -> list[Evaluation]:
    """The evaluations of `litgpt search` around a size, a third of the teacher; goes on where it was interrupted.

    Candidates are scored as cut unless the flags say otherwise.
    """
    path = out_dir / JOURNAL
    n_done = len(read_journal(path)[1]) if path.is_file() else 0
    if n_done < iterations:
        size = size or n_params(data.config, SubNet.full(data.config)) // 3
        # all sizes, and the space that the figures so far are of
        figures = ("--search_space.convertible=false", "--space=coarse_layerwise")
        flags = (*figures, *data.flags(batch=4), f"--iterations={iterations}", *flags)
        flags = ("--fitness=perplexity", *flags, f"--out_dir={out_dir}")
        litgpt("search", data.teacher, f"--bin={size}±5%", f"--resume={str(n_done > 0).lower()}", *flags)
    return read_journal(path)[1][:iterations]


def train_settings(
    path: Path, data: Data, tokens: int, lr: float, every: int, seed: int = 42, config: Config | None = None
) -> Path:
    """Writes the YAML of a plain training run (`distill.beta` 0), of random weights where there is a `config`."""
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
    """A teacher's cache of the tokens that are trained on; which those are follows from the seed."""
    is_begun = (folder / "index.json").is_file()
    if not is_begun or not Index.read(folder).complete:
        flags = [f"--codec={CODECS[codec]}", f"--max_tokens={tokens}", f"--resume={str(is_begun).lower()}"]
        flags += [*data.flags(batch, seed), f"--out_dir={folder}", "--precision=32-true"]
        litgpt("cache_teacher", data.teacher, *flags)
    return folder


@torch.inference_mode()
def validate(model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """A model's mean loss over batches, in nats per token, by PyTorch's own cross-entropy."""
    total = n = 0
    for ids, targets in batches:
        model.max_seq_length = ids.size(1)
        loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
        total, n = total + float(loss), n + int((targets != -100).sum())
    return total / n


def val_losses(out_dir: Path) -> list[tuple[int, float]]:
    """Tokens and validation loss of a run, in their order."""
    return TrainingResult(out_dir).curve
