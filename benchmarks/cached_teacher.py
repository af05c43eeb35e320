"""Measure bytes and tokens per second of each teacher-cache codec, against `litgpt pretrain` and a live teacher.

    python benchmarks/cached_teacher.py [--student pythia-14m] [--teacher_name pythia-31m] [--steps 12] [--repeats 5]

The same student trains on random tokens by `litgpt pretrain`, by `litgpt distill` with each cache, and by `litgpt
distill` with the live teacher: uncompiled, interleaved, in one process. Reported are medians of the CPU time between
two optimizer steps, everything included. Goal: a cache reaches at least 0.9 of the speed of `litgpt pretrain`.
`evidence.py` measures the loss of quality.
"""

import argparse
import contextlib
import io
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import litgpt.pretrain
import torch
from lightning.fabric.loggers import CSVLogger
from litgpt.args import EvalArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.model import GPT
from litgpt.utils import save_config
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from litgpt_whittle.commands import cache_teacher, distill
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.distillation.cache import Index, shard_path
from litgpt_whittle.training.args import TrainArgs

OUT = Path("out/cached_teacher")
CODECS = {"sampled 12": {"sampled": {"draws": 12}}, "top-k 64": {"top_k": {"k": 64}}}
LIMITS = {"sampled 12": 50, "top-k 64": 260}
OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}


@dataclass
class RandomTokens(DataModule):
    """Shuffled windows of random tokens."""

    n_windows: int = 64
    vocab_size: int = 50_254

    def __post_init__(self) -> None:
        super().__init__()

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None) -> None:
        self.batch_size, self.length = batch_size, max_seq_length + 1

    def train_dataloader(self) -> DataLoader:
        ids = torch.randint(self.vocab_size, (self.n_windows, self.length), generator=torch.Generator().manual_seed(0))
        return DataLoader(ids, batch_size=self.batch_size, shuffle=True, drop_last=True)

    val_dataloader = train_dataloader


def measure_speed(args: argparse.Namespace) -> None:
    folder = OUT / "speed"
    shutil.rmtree(folder, ignore_errors=True)
    teacher = random_checkpoint(folder / "teacher", args.teacher_name, args.length)
    data = RandomTokens(args.windows)
    for name, codec in CODECS.items():
        out_dir = folder / name.replace(" ", "-")
        started, n_tokens = time.perf_counter(), args.windows * args.length
        with quiet():
            windows = cache_teacher.WindowArgs(args.batch, args.length)
            cache_teacher.setup(teacher, data, out_dir, codec=codec, train=windows, precision="32-true")
        rate = n_tokens / (time.perf_counter() - started)
        print(f"{name}: {bytes_per_token(out_dir):.2f} bytes per token (at most {LIMITS[name]}), {rate:,.0f} tokens/s")
    ways: dict[str, Callable[[Path], None]] = {"litgpt pretrain": lambda out: pretrain(args, data, out)}
    for name in CODECS:
        ways[name] = lambda out, name=name: student(args, data, out, teacher_cache=folder / name.replace(" ", "-"))
    ways["live teacher"] = lambda out: student(args, data, out, teacher_checkpoint_dir=teacher)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.repeats):
        for name, way in ways.items():
            seconds[name] += step_seconds(lambda: way(folder / "run"))
            print(
                f"  round {repeat + 1}, {name}: {args.batch * args.length / seconds[name][-1]:,.0f} tokens/s",
                flush=True,
            )
    rates = {name: args.batch * args.length / statistics.median(times) for name, times in seconds.items()}
    for name, rate in rates.items():
        shares = ", ".join(f"{rate / rates[other]:.3f} of {other}" for other in ("litgpt pretrain", "live teacher"))
        print(f"{name:16} {rate:8,.0f} tokens/s: {shares}")
    print("goal for the caches: at least 0.9 of litgpt pretrain")


def random_checkpoint(folder: Path, name: str, length: int) -> Path:
    """Return a teacher checkpoint with random weights, which do not affect the speed."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = Config.from_name(name, block_size=length)
    torch.save(GPT(config).state_dict(), folder / "lit_model.pth")
    save_config(config, folder)
    return folder


def bytes_per_token(folder: Path) -> float:
    """Return the cache's bytes per token, with all shards, tokens and keys."""
    index = Index.read(folder)
    n_bytes = sum(shard_path(folder, i).stat().st_size for i in range(len(index.shards)))
    return n_bytes / sum(shard.n_windows for shard in index.shards) / index.length


def step_seconds(run: Callable[[], None]) -> list[float]:
    """Return the CPU seconds between optimizer steps, without the first two."""
    moments: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: moments.append(time.process_time()))
    with quiet():
        run()
    hook.remove()
    return [after - before for before, after in zip(moments, moments[1:])][2:]


def settings(args: argparse.Namespace) -> tuple[Config, TrainArgs, EvalArgs]:
    """Return the settings that all training runs share; no validation happens between two steps."""
    n_tokens = args.steps * args.batch * args.length
    train = TrainArgs(
        save_interval=None,
        log_interval=1,
        global_batch_size=args.batch,
        micro_batch_size=args.batch,
        max_tokens=n_tokens,
        max_norm=1.0,
        min_lr=1e-4,
        lr_warmup_steps=2,
        tie_embeddings=False,
    )
    evaluation = EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False)
    return Config.from_name(args.student, block_size=args.length), train, evaluation


def pretrain(args: argparse.Namespace, data: RandomTokens, out_dir: Path) -> None:
    """Run `litgpt pretrain` through its `setup`, without a compiler."""
    config, train, evaluation = settings(args)
    compile, save = torch.compile, litgpt.pretrain.save_hyperparameters
    torch.compile, litgpt.pretrain.save_hyperparameters = lambda model: model, lambda *_: None
    try:
        fabric = L.Fabric(devices=1, precision="32-true", loggers=[CSVLogger(out_dir / "logs")])
        litgpt.pretrain.main(
            fabric=fabric,
            devices=1,
            seed=42,
            initial_checkpoint_dir=None,
            resume=False,
            config=config,
            data=data,
            out_dir=out_dir,
            tokenizer_dir=None,
            tokenizer=None,
            train=train,
            eval=evaluation,
            optimizer=OPTIMIZER,
        )
    finally:
        torch.compile, litgpt.pretrain.save_hyperparameters = compile, save


def student(args: argparse.Namespace, data: RandomTokens, out_dir: Path, **more) -> None:
    """Train the student by `litgpt distill`."""
    config, train, evaluation = settings(args)
    distill.setup(
        model_config=config,
        out_dir=out_dir,
        precision="32-true",
        data=data,
        train=train,
        eval=evaluation,
        optimizer=OPTIMIZER,
        devices=1,
        logger_name="csv",
        compile=False,
        **{"distill": DistillArgs(), **more},
    )


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="pythia-14m", help="a litgpt model")
    parser.add_argument("--teacher_name", default="pythia-31m", help="the teacher's litgpt model")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure_speed(args)


if __name__ == "__main__":
    main()
