"""Shared parts of all steps: sizes, models with random weights, random tokens, clocks and the profiler."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import save_config
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from litgpt_whittle import SubNet, n_params
from litgpt_whittle.processes import peak_memory
from litgpt_whittle.spaces.args import SpaceArgs
from litgpt_whittle.spaces.bins import parse_bins
from litgpt_whittle.spaces.sizes import decided
from litgpt_whittle.spaces.space import Space

sys.path.append(str(Path(__file__).parents[1]))
from cached_teacher import RandomTokens

TEACHER = "pythia-1.4b"
STUDENT = "pythia-410m"
TOY = {
    TEACHER: {"n_layer": 4, "n_embd": 64, "n_head": 4, "intermediate_size": 256},
    STUDENT: {"n_layer": 2, "n_embd": 32, "n_head": 2, "intermediate_size": 128},
}
"""Sizes that replace the model's own with --tiny; both have 4,096 tokens and a block size of 64"""

PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250, "L40S": 362, "RTX 4090": 165}
"""Dense bf16 TFLOP/s by a part of the card's name, from the vendor's data sheets"""


@dataclass
class Tokens(RandomTokens):
    """Random tokens for training, and others for validation."""

    n_validation: int = 64
    """Validation windows"""

    def val_dataloader(self) -> DataLoader:
        """Return a dataloader of windows that are not in the training data."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.vocab_size, (self.n_validation, self.length), generator=generator)
        return DataLoader(ids, batch_size=self.batch_size, drop_last=True)


@dataclass(frozen=True)
class Bench:
    """Folders and sizes of a run.

    Args:
        out: Folder of the results.
        work: Folder of checkpoints, which later steps reuse.
        tiny: If true, use toy sizes that a CPU can run.
    """

    out: Path
    work: Path
    tiny: bool = False

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU if there is none."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights while candidates are scored, as `litgpt search` chooses it."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def size(self, whole: Any, toy: Any) -> Any:
        """Return one of two sizes, the second one with --tiny."""
        return toy if self.tiny else whole

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.size(2048, 64)

    @property
    def rows(self) -> int:
        """Sequences per batch."""
        return self.size(8, 2)

    def config(self, name: str) -> Config:
        """Return the config of a model; with --tiny, of a toy of the same family."""
        toy = {"block_size": 64, "vocab_size": 4096, "padded_vocab_size": 4096} | TOY[name]
        return Config.from_name(name, **self.size({}, toy))

    def checkpoint(self, name: str) -> Path:
        """Return a checkpoint of a model with random weights in bf16, written at the first call."""
        folder = self.work / name
        if (folder / "model_config.yaml").is_file():  # written last
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        with self.device:
            model = GPT(self.config(name))
        for key, weight in model.named_parameters():
            mean = 1.0 if "norm" in key or "ln_f" in key else 0.0
            torch.nn.init.normal_(weight, mean if key.endswith("weight") else 0.0, 0.02)
        weights = {key: weight.to("cpu", torch.bfloat16) for key, weight in model.state_dict().items()}
        torch.save(weights, folder / "lit_model.pth")
        save_config(model.config, folder)
        return folder

    def tokens(self, n: int = 0) -> Tokens:
        """Return a data module with at least n training tokens."""
        n_windows = max(-(-n // self.length) + self.rows, 64)
        return Tokens(n_windows, self.config(TEACHER).vocab_size, max(n_windows // 16, 64))

    def space(self) -> Space:
        """Return the space that `litgpt search` has by default, around the student's size."""
        teacher, student = self.config(TEACHER), self.config(STUDENT)
        (bin,) = parse_bins(f"{n_params(student, SubNet.full(student))}±5%")
        return Space(teacher, "fine_uniform", bin, args=decided(SpaceArgs(), teacher))

    def subnet(self, seed: int = 0) -> SubNet:
        """Return a random sub-network of the teacher, of the student's size."""
        return self.space().sample(np.random.default_rng(seed))

    def folder(self, name: str) -> Path:
        """Return an empty folder for a command's outputs."""
        folders = sorted(self.work.glob(f"{name}-*"))
        return self.work / f"{name}-{len(folders)}"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], repeats: int = 5, warm: int = 1) -> float:
        """Return the median seconds of a function, after calls to warm up."""
        for _ in range(warm):
            run()
        times = []
        for _ in range(repeats):
            self.synchronize()
            started = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def peak_gb(self) -> float:
        """Return the peak memory of this process on the device, in GB."""
        return peak_memory(self.device) / 1e9

    def forget_peak(self) -> None:
        """Give back freed memory of the GPU, and measure its peak from now on."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_flops(self) -> float | None:
        """Return the card's bf16 FLOP/s by its data sheet; None if it is unknown."""
        if self.device.type != "cuda":
            return None
        card = torch.cuda.get_device_name()
        return next((1e12 * tflops for name, tflops in PEAKS.items() if name in card), None)

    def of_peak(self, flops: float, seconds: float) -> float | None:
        """Return the achieved share of the card's bf16 peak; None if that is unknown."""
        peak = self.peak_flops()
        return None if peak is None else flops / seconds / peak

    def busy(self, run: Callable[[], Any], title: str) -> float:
        """Profile a function, append the table to profiles.txt, and return the device's busy share of the time."""
        profiler = make_profiler(self.device)
        self.synchronize()
        started = time.perf_counter()
        with profiler:
            run()
            self.synchronize()
        return self.write_profile(profiler, title, time.perf_counter() - started)

    def write_profile(self, profiler: profile, title: str, seconds: float) -> float:
        """Append a finished profile to profiles.txt, and return the device's busy share of `seconds`."""
        rows = profiler.key_averages()
        kernels = sum(getattr(row, "self_device_time_total", 0) for row in rows) / 1e6
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = rows.table(sort_by=order, row_limit=25, max_name_column_width=70)
        with open(self.out / "profiles.txt", "a") as file:
            file.write(f"{title}: {seconds:.4f} s, of which kernels {kernels:.4f} s\n{table}\n\n")
        return kernels / seconds


def make_profiler(device: torch.device) -> profile:
    """Return a profiler of the CPU and the device."""
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *on_gpu])
