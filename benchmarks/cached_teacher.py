"""What a cached teacher costs and gives up: bytes and tokens per second of each codec, students' perplexity.

    python benchmarks/cached_teacher.py [--student pythia-14m] [--teacher_name pythia-31m] [--steps 12] [--repeats 5]
    python benchmarks/cached_teacher.py --parts perplexity --teacher CHECKPOINT_DIR --train train.parquet \
        --validation validation.parquet

Speed: the same student trains on random tokens by `litgpt pretrain`, by `litgpt distill` with each cache, and with the
live teacher, all without compiling and in one process, taking turns. What counts is the CPU time from one optimizer
step to the next, whatever is done in it; compared are medians. Goal: with a cache at least 0.9 of what `litgpt
pretrain` does.

Perplexity: students cut from a real teacher, trained on the same tokens with the live teacher and with each cache.
Runs go on where they were interrupted.
"""

import argparse
import contextlib
import io
import json
import math
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
from repair import SIZES
from students import Data, train_settings, val_losses
from students import litgpt as command
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from litgpt_whittle import SubNet
from litgpt_whittle.args import DistillArgs, TrainArgs
from litgpt_whittle.cache import Index, shard_path
from litgpt_whittle.commands import cache_teacher, distill

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


# -- bytes and speed


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
    """A teacher of that shape; how fast it is does not depend on its weights."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = Config.from_name(name, block_size=length)
    torch.save(GPT(config).state_dict(), folder / "lit_model.pth")
    save_config(config, folder)
    return folder


def bytes_per_token(folder: Path) -> float:
    """All of the shards, tokens and keys counted."""
    index = Index.read(folder)
    n_bytes = sum(shard_path(folder, i).stat().st_size for i in range(len(index.shards)))
    return n_bytes / sum(shard.n_windows for shard in index.shards) / index.length


def step_seconds(run: Callable[[], None]) -> list[float]:
    """CPU seconds from one optimizer step to the next, without the first two."""
    moments: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: moments.append(time.process_time()))
    with quiet():
        run()
    hook.remove()
    return [after - before for before, after in zip(moments, moments[1:])][2:]


def settings(args: argparse.Namespace) -> tuple[Config, TrainArgs, EvalArgs]:
    """What all ways of training share; no validation falls between two steps."""
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
    """`litgpt pretrain`, as its `setup` calls it, without a compiler."""
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
    """`litgpt distill`."""
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


# -- perplexity


def measure_perplexity(args: argparse.Namespace) -> None:
    """The same student, the same tokens, by what it learns from."""
    data = Data(args)
    folder = OUT / "perplexity"
    folder.mkdir(parents=True, exist_ok=True)
    SubNet(data.config, **SIZES["py-stdlib-8m"]).save(folder / "sub_network.yaml")
    start = folder / "start"
    if not (start / "lit_model.pth").is_file():
        command("extract", data.teacher, folder / "sub_network.yaml", f"--out_dir={start}")
    found: dict[str, list[float]] = {}
    for seed in args.seeds:
        teachers = {"no teacher": ["--distill.beta=0"], "live teacher": [f"--teacher_checkpoint_dir={data.teacher}"]}
        teachers |= {name: [f"--teacher_cache={cached(data, args, name, seed)}"] for name in CODECS}
        for name, flags in teachers.items():
            loss = final_loss(data, args, folder / f"{name.replace(' ', '-')}-{seed}", start, seed, flags)
            found.setdefault(name, []).append(loss)
            print(f"seed {seed}, {name}: perplexity {math.exp(loss):.3f}", flush=True)
    for name, losses in found.items():
        mean = statistics.mean(losses)
        gap = mean - statistics.mean(found["live teacher"])
        print(f"{name:14} NLL {mean:.4f}, {gap:+.4f} to the live teacher, perplexity {math.exp(mean):.3f}")


def cached(data: Data, args: argparse.Namespace, name: str, seed: int) -> Path:
    """A cache of the tokens that are trained on, whose order follows from the seed."""
    folder = OUT / "perplexity" / f"cache-{name.replace(' ', '-')}-{seed}"
    is_begun = (folder / "index.json").is_file()
    if not is_begun or not Index.read(folder).complete:
        flags = [
            f"--codec={json.dumps(CODECS[name])}",
            f"--max_tokens={args.tokens}",
            f"--resume={str(is_begun).lower()}",
        ]
        flags += [*data.flags(batch=16, seed=seed), f"--out_dir={folder}", "--precision=32-true"]
        print(command("cache_teacher", data.teacher, *flags).splitlines()[-2].strip(), flush=True)
    return folder


def final_loss(data: Data, args: argparse.Namespace, folder: Path, start: Path, seed: int, flags: list[str]) -> float:
    """Validation loss of a student after its training."""
    if not (folder / "final/lit_model.pth").is_file():
        path = folder.with_suffix(".yaml")
        train_settings(path, data, args.tokens, args.lr, every=10_000, seed=seed)
        flags = flags if "--distill.beta=0" in flags else [*flags, "--distill.beta=0.8"]
        command("distill", f"--config={path}", f"--initial_checkpoint_dir={start}", f"--out_dir={folder}", *flags)
    return val_losses(folder)[-1][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=["speed", "perplexity"], default=["speed"])
    parser.add_argument("--student", default="pythia-14m", help="a litgpt model, for the speed")
    parser.add_argument("--teacher_name", default="pythia-31m", help="likewise")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--teacher", type=Path, help="a litgpt checkpoint, for the perplexity")
    parser.add_argument("--train", type=Path, help="what it was trained on")
    parser.add_argument("--validation", type=Path, help="what it was not")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "speed" in args.parts:
        measure_speed(args)
    if "perplexity" in args.parts:
        if None in (args.teacher, args.train, args.validation):
            parser.error("the perplexity needs --teacher, --train and --validation")
        measure_perplexity(args)


if __name__ == "__main__":
    main()
