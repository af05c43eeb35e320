"""Measure ceilings of the card: matrix products, decompositions, copies, and kernel launches."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version

import torch
import torch.nn.functional as F
from bench import Bench

WIDTHS = ((1679, 6717), (1680, 6720), (1664, 6720))
"""Channels and neurons of an MLP: unaligned, multiples of 8, and channels in multiples of 64"""


def card(bench: Bench) -> Iterator[dict]:
    """Measure the products, decompositions and copies that all other steps consist of."""
    yield describe(bench)
    yield products(bench)
    yield mlps(bench)
    yield decompositions(bench)
    yield traffic(bench)


def describe(bench: Bench) -> dict:
    """Return the versions of the software and the name of the device."""
    found: dict = {name: version(name) for name in ("torch", "lightning", "litgpt")}
    found |= {"python": platform.python_version(), "cpu_cores": os.cpu_count(), "device": platform.machine()}
    if bench.device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"device": card.name, "memory_gb": card.total_memory / 1e9}
    return found


def products(bench: Bench) -> dict[str, float]:
    """Return the TFLOP/s of square products in bf16, TF32 and fp32."""
    n = bench.size(8192, 256)
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    x, y = a.float(), b.float()
    before, found = torch.get_float32_matmul_precision(), {}
    for name, precision, pair in (("bf16", "high", (a, b)), ("tf32", "high", (x, y)), ("fp32", "highest", (x, y))):
        torch.set_float32_matmul_precision(precision)
        found[f"{name}_tflops"] = 2 * n**3 / bench.seconds(lambda: torch.mm(*pair)) / 1e12
    torch.set_float32_matmul_precision(before)
    return found


def mlps(bench: Bench) -> dict[str, float]:
    """Return the TFLOP/s of two linear maps in bf16, forward and backward, by their sizes."""
    n, found = bench.size(16_384, 64), {}
    for n_embd, inner in WIDTHS:
        n_embd, inner = (max(size // bench.size(1, 16), 1) for size in (n_embd, inner))
        x, up, down = (
            torch.randn(*shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
            for shape in ((n, n_embd), (inner, n_embd), (n_embd, inner))
        )

        def step(x=x, up=up, down=down) -> None:
            F.linear(F.linear(x, up), down).sum().backward()

        found[f"mlp_{n_embd}x{inner}_tflops"] = 12 * n * n_embd * inner / bench.seconds(step) / 1e12
    return found


def decompositions(bench: Bench) -> dict[str, float]:
    """Return the seconds of the decompositions that a repair takes of its moments."""
    n = bench.size(2048, 64)
    x = torch.randn(n, 2 * n, device=bench.device, dtype=torch.float64)
    moments = x @ x.T
    found: dict[str, float] = {"decomposed_size": n}
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        matrix = moments.to(dtype)
        found[f"cholesky_{name}_s"] = bench.seconds(lambda: torch.linalg.cholesky(matrix), 3)
        found[f"product_{name}_s"] = bench.seconds(lambda: matrix @ matrix, 3)
    return found | {"eigh_fp64_s": bench.seconds(lambda: torch.linalg.eigh(moments), 1)}


def traffic(bench: Bench) -> dict[str, float]:
    """Return the bandwidth of copies and gathers, and the time to launch a kernel and to send a small index."""
    n_bytes, n = bench.size(2**30, 2**20), bench.size(8192, 256)
    source, target = (torch.empty(n_bytes, device=bench.device, dtype=torch.uint8) for _ in range(2))
    matrix = torch.randn(n, n, device=bench.device, dtype=torch.bfloat16)
    chosen = torch.randperm(n)[: n // 8].sort().values
    on_device, one = chosen.to(bench.device), torch.zeros(1, device=bench.device)

    def tb_per_second(n_moved: int, run) -> float:
        return 2 * n_moved / bench.seconds(run) / 1e12

    gathered = 2 * n * len(chosen)
    return {
        "copy_tb_per_s": tb_per_second(n_bytes, lambda: target.copy_(source)),
        "gather_rows_tb_per_s": tb_per_second(gathered, lambda: matrix.index_select(0, on_device)),
        "gather_columns_tb_per_s": tb_per_second(gathered, lambda: matrix.index_select(1, on_device)),
        "index_to_device_us": bench.seconds(lambda: chosen.to(bench.device)) * 1e6,
        "launch_us": bench.seconds(lambda: [one.add_(0) for _ in range(1000)], 3) * 1e3,
    }
