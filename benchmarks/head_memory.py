"""Measure peak memory and time of the chunked LM head and loss against the plain formula and, if installed, Liger.

    python benchmarks/head_memory.py [--threads 1] [--repeats 5] [--tokens 8192] [--n_embd 512] [--teacher_n_embd 1024]
    python benchmarks/head_memory.py --vocab 151936 --tokens 2048

Memory is the peak resident size of one process per implementation, minus its size before the loss (inputs and weights).
Time is CPU seconds in one process, interleaved, as medians. Both cover one forward and backward pass of
0.2 · CE + 0.8 · 0.81 · KL(teacher ‖ student) at T = 0.9, from hidden states to the gradients of hidden states and head.
Liger's is its `chunked_loss`, which is plain PyTorch and runs without a GPU; like ours, it is not compiled.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from litgpt_whittle.distillation.head import HeadInput, TeacherLogits, head_loss
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.processes import peak_resident

OBJECTIVE = Objective(alpha=0.2, beta=0.8, temperature=0.9)


def make_inputs(args: argparse.Namespace) -> tuple[HeadInput, HeadInput, torch.Tensor]:
    torch.manual_seed(0)
    student, teacher = (
        # in place: temporary tensors here would raise the peak and hide the loss's own memory
        HeadInput(torch.randn(1, args.tokens, width), torch.randn(args.vocab, width).div_(width**0.5), None)
        for width in (args.n_embd, args.teacher_n_embd)
    )
    for tensor in student[:2]:
        tensor.requires_grad_()
    return student, teacher, torch.randint(args.vocab, (1, args.tokens))


def plain(student: HeadInput, teacher: HeadInput, targets: torch.Tensor) -> torch.Tensor:
    """Compute the plain formula with PyTorch's own losses."""
    logits = F.linear(student.hidden, student.weight).flatten(0, 1)
    with torch.no_grad():
        teacher_logits = F.linear(teacher.hidden, teacher.weight).flatten(0, 1)
    t = OBJECTIVE.temperature
    ce = F.cross_entropy(logits, targets.flatten())
    log_p, log_q = F.log_softmax(logits / t, dim=-1), F.log_softmax(teacher_logits / t, dim=-1)
    kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return OBJECTIVE.alpha * ce + OBJECTIVE.beta * t**2 * kl


def chunked(student: HeadInput, teacher: HeadInput, targets: torch.Tensor) -> torch.Tensor:
    return head_loss(student, targets, OBJECTIVE, TeacherLogits(teacher)).loss


def liger(student: HeadInput, teacher: HeadInput, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    t = OBJECTIVE.temperature
    # beta 0 is Liger's forward KL; Liger does not multiply by T²
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=OBJECTIVE.alpha,
        weight_soft_loss=OBJECTIVE.beta * t**2,
        beta=0.0,
        temperature=t,
        compiled=False,
    )
    hidden, taught = student.hidden.flatten(0, 1), teacher.hidden.flatten(0, 1)
    return loss(hidden, student.weight, taught, teacher.weight, targets.flatten())


WAYS = {"plain": plain, "chunked": chunked}
if importlib.util.find_spec("liger_kernel"):
    WAYS["liger"] = liger


def peak_mib() -> float:
    return peak_resident() / 2**20


def measure_memory(args: argparse.Namespace) -> None:
    inputs = make_inputs(args)
    before = peak_mib()
    WAYS[args.way](*inputs).backward()
    print(peak_mib() - before)


def measure_time(args: argparse.Namespace) -> dict[str, float]:
    inputs = make_inputs(args)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(args.repeats + 1):
        for name, way in WAYS.items():
            for tensor in inputs[0][:2]:
                tensor.grad = None
            start = time.process_time()
            loss = way(*inputs)
            loss.backward()
            if repeat:  # the first round is a warm-up
                seconds[name].append(time.process_time() - start)
            print(f"  {name}: loss {loss.item():.6f}, {time.process_time() - start:.2f} s", file=sys.stderr)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--time_tokens", type=int, default=None, help="tokens to time; by default the same")
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--n_embd", type=int, default=512)
    parser.add_argument("--teacher_n_embd", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.way:
        measure_memory(args)
        return
    command = [sys.executable, __file__, *sys.argv[1:]]
    memory = {}
    for name in WAYS:
        memory[name] = float(subprocess.run([*command, "--way", name], check=True, capture_output=True).stdout)
    for name in WAYS:
        print(f"{name}: {memory[name]:,.0f} MiB, {memory[name] / memory['chunked']:.1f} × ours", flush=True)
    args.tokens = args.time_tokens or args.tokens
    times = measure_time(args)
    for name, seconds in times.items():
        print(f"{name}: {seconds:.2f} CPU seconds for {args.tokens:,} tokens, {seconds / times['chunked']:.2f} × ours")


if __name__ == "__main__":
    main()
