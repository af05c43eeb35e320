"""Measure tokens per second and memory of `litgpt distill` against its parts and against whittle.

    python benchmarks/distill_throughput.py
    python benchmarks/distill_throughput.py --whittle_python WHITTLE_ENVIRONMENT/bin/python

The same student trains on the same random tokens by `litgpt pretrain`, by `litgpt distill` without and with a teacher,
and by whittle's `distill_model`; the teacher's forward pass is also timed alone. Nothing is compiled. Each method runs
in its own process, and the processes alternate. Reported are medians of the CPU seconds between optimizer steps, which
other load on the machine disturbs less than wall time. Memory is the process's peak resident size minus its size before
the models were created.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from cached_teacher import RandomTokens, pretrain, random_checkpoint, student
from litgpt.config import Config
from search_memory import resident
from torch.optim.optimizer import register_optimizer_step_post_hook

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.processes import peak_resident

OURS = ("litgpt pretrain", "distill, beta 0", "distill", "teacher alone")

RIVAL = """
import json, resource, sys, time
from pathlib import Path
import lightning as L, torch
import whittle.distill_model as rival
from lightning.fabric.loggers import CSVLogger
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from whittle.args import DistillArgs
given = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.compile = lambda model: model
class Data:
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None, **_):
        self.batch_size, self.length = batch_size, max_seq_length + 1
    prepare_data = setup = lambda self, *_: None
    def train_dataloader(self):
        ids = torch.randint(50254, (64, self.length), generator=torch.Generator().manual_seed(0))
        return DataLoader(ids, batch_size=self.batch_size, shuffle=True, drop_last=True)
    val_dataloader = train_dataloader
moments = []
register_optimizer_step_post_hook(lambda *_: moments.append(time.process_time()))
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
before = int(lines["VmRSS"].split()[0]) * 1024
fabric = L.Fabric(devices=1, precision="32-true", loggers=[CSVLogger(given["out"])])
batch, length = given["batch"], given["length"]
train = TrainArgs(
    save_interval=None, log_interval=1, global_batch_size=batch, micro_batch_size=batch, max_norm=1.0, min_lr=1e-4,
    max_tokens=given["steps"] * batch * length, lr_warmup_steps=2, tie_embeddings=False, max_seq_length=length,
)
evaluation = EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False)
teacher = Path(given["teacher"])
rival.main(
    fabric=fabric, teacher_checkpoint_dir=teacher, devices=1, seed=42, initial_checkpoint_dir=None, resume=False,
    data=Data(), teacher_config=Config.from_file(teacher / "model_config.yaml"), out_dir=Path(given["out"]),
    tokenizer_dir=None, tokenizer=None, train=train, eval=evaluation,
    optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
    distill=DistillArgs(method="logits", temperature=0.9, alpha=0.2, beta=0.8, loss="forward_kld"),
    student_config=Config.from_name(given["student"], block_size=length),
)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("RESULT", json.dumps({"moments": moments, "peak": peak - before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="pythia-14m", help="the student's litgpt model")
    parser.add_argument("--teacher_name", default="pythia-31m", help="the teacher's litgpt model")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--whittle_python", help="the Python of an environment that has whittle")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        measure(args)
        return
    print(f"{platform.machine()}, Python {platform.python_version()}, PyTorch {torch.__version__}, one thread")
    print(f"{args.student} from {args.teacher_name}, {args.batch} × {args.length} tokens per step", flush=True)
    ways = [*OURS, *(["whittle"] if args.whittle_python else [])]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(Path(folder) / "teacher", args.teacher_name, args.length)
        for _ in range(args.repeats):
            for way in ways:
                found = run(args, way, Path(folder))
                moments = found["moments"]
                seconds[way] += [after - before for before, after in zip(moments, moments[1:])][2:]
                peaks[way] = max(peaks.get(way, 0), found["peak"])
    report({way: statistics.median(times) for way, times in seconds.items()}, peaks, args.batch * args.length)


def run(args: argparse.Namespace, way: str, folder: Path) -> dict:
    """Run one method in its own process."""
    if way == "whittle":
        given = {"teacher": str(folder / "teacher"), "out": str(folder / "rival"), "student": args.student}
        given |= {"batch": args.batch, "length": args.length, "steps": args.steps}
        command = [args.whittle_python, "-c", RIVAL, json.dumps(given)]
    else:
        command = [sys.executable, __file__, *sys.argv[1:], f"--way={way}", f"--folder={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {way} failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.partition("RESULT")[2])


def measure(args: argparse.Namespace) -> None:
    """Measure the CPU time at the end of each step, and the memory of the process."""
    torch.set_num_threads(1)
    out, data, teacher = args.folder / "run", RandomTokens(), args.folder / "teacher"
    shutil.rmtree(out, ignore_errors=True)
    moments: list[float] = []
    register_optimizer_step_post_hook(lambda *_: moments.append(time.process_time()))
    before = resident()
    if args.way == "litgpt pretrain":
        pretrain(args, data, out)
    elif args.way == "distill, beta 0":
        student(args, data, out, distill=DistillArgs(beta=0))
    elif args.way == "distill":
        student(args, data, out, teacher_checkpoint_dir=teacher)
    else:
        model = load_model(teacher)
        ids = torch.randint(Config.from_name(args.teacher_name).vocab_size, (args.batch, args.length))
        for _ in range(args.steps):
            with torch.inference_mode():
                model(ids)
            moments.append(time.process_time())
    peak = peak_resident()
    print("RESULT", json.dumps({"moments": moments, "peak": peak - before}))


def report(seconds: dict[str, float], peaks: dict[str, int], n_tokens: int) -> None:
    """Print speeds, memory and the ratios with their goals."""
    for way, median in seconds.items():
        print(f"{way:16} {n_tokens / median:8,.0f} tokens per CPU second, {peaks[way] / 1e6:6,.0f} MB")
    ours = seconds["distill"]
    parts = seconds["litgpt pretrain"] + seconds["teacher alone"]
    print(f"distill, of the speed of its parts       {parts / ours:.2f} ×, goal 0.95")
    alone = seconds["litgpt pretrain"] / seconds["distill, beta 0"]
    print(f"distill, beta 0, against litgpt pretrain {alone:.2f} ×, goal 1.0")
    if "whittle" in seconds:
        print(f"distill against whittle                  {seconds['whittle'] / ours:.2f} ×, goal 1.3")
        print(f"memory against whittle                   {peaks['distill'] / peaks['whittle']:.2f}, goal 0.5")


if __name__ == "__main__":
    main()
