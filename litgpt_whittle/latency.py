"""Measured prefill and decode latency of a sub-network."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from litgpt.model import GPT

from litgpt_whittle.errors import UserError
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import student_model

NextToken = Callable[[torch.Tensor, int], torch.Tensor]


class Latency(NamedTuple):
    """Latency of a batch in seconds."""

    prefill: float
    """Time to the first new token"""
    decode: float
    """Time per further token"""


@torch.inference_mode()
def latency(
    subnet: SubNet,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    prompt_length: int = 512,
    new_tokens: int = 32,
    repeats: int = 5,
) -> Latency:
    """Measure generation with the KV cache, as in `litgpt generate`, for a student with random weights.

    Prompts longer than the smallest sliding window are processed in chunks of its size, as litgpt's cache requires.
    Decoding is greedy, and each token is fetched from the device before the next is computed. On CUDA, a decoding step
    is replayed as a graph, as inference engines do; launching its kernels one by one would take longer than running
    them. Models with sliding windows or experts, whose steps wait for the device, run without a graph.

    Args:
        subnet: The student's sub-network.
        device: Device to measure on.
        dtype: dtype of weights, activations and KV cache.
        batch_size: Prompts per batch.
        prompt_length: Tokens per prompt.
        new_tokens: Number of tokens decoded after the first new one.
        repeats: Number of runs, of which the median is returned; one warm-up run precedes them.

    Raises:
        UserError: If a number is below 1, or `prompt_length + new_tokens` exceeds the block size.
    """
    numbers = dict(batch_size=batch_size, prompt_length=prompt_length, new_tokens=new_tokens, repeats=repeats)
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}; raise it")
    length = prompt_length + new_tokens
    if length > subnet.config.block_size:
        raise UserError(
            f"prompt_length + new_tokens must be at most the block_size {subnet.config.block_size}, got {length}; "
            "lower one"
        )
    model = _random_student(subnet, device, dtype, length)
    with contextlib.redirect_stdout(io.StringIO()):  # with latent attention, litgpt prints a warning for every layer
        model.set_kv_cache(batch_size, device=device, dtype=dtype)
    prompt = torch.randint(subnet.config.vocab_size, (batch_size, prompt_length), generator=_generator("cpu")).to(
        device
    )
    can_capture = _can_capture(subnet, prompt.device)
    decode = _DecodingGraph(model, batch_size, length - 1) if can_capture else partial(_next_token, model)
    runs = [_answer(model, prompt, new_tokens, decode) for _ in range(repeats + 1)][1:]
    return Latency(*(median(seconds) for seconds in zip(*runs)))


def _random_student(subnet: SubNet, device: torch.device | str, dtype: torch.dtype, max_seq_length: int) -> GPT:
    """Create the student with random weights, on the device."""
    with torch.device("meta"):
        model = student_model(subnet)
        model.max_seq_length = max_seq_length
    model = model.to(dtype).to_empty(device=device).eval()
    generator = _generator(device)
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.02, generator=generator)
    model.cos, model.sin = (cache.to(dtype) for cache in model.rope_cache(device))
    return model


def _generator(device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _answer(model: GPT, prompt: torch.Tensor, new_tokens: int, decode: NextToken) -> tuple[float, float]:
    """Return the seconds to process the prompts, shape (B, T), and the seconds per further token."""
    started = perf_counter()
    token = _next_token(model, prompt, 0)
    prefilled = perf_counter()
    for position in range(prompt.size(1), prompt.size(1) + new_tokens):
        token = decode(token, position)
    return prefilled - started, (perf_counter() - prefilled) / new_tokens


def _next_token(model: GPT, idx: torch.Tensor, position: int) -> torch.Tensor:
    """Return the most likely next token, shape (B, 1), after the tokens `idx`, shape (B, T), from `position` on."""
    for piece in idx.split(_window(model), dim=1):
        end = position + piece.size(1)
        input_pos = torch.arange(position, end, device=idx.device)
        logits = model(piece, input_pos, input_pos_maxp1=end)  # (B, T, V)
        position = end
    token = logits[:, -1:].argmax(-1)
    token.tolist()  # synchronises with the device
    return token


def _can_capture(subnet: SubNet, device: torch.device) -> bool:
    """Return whether a decoding step can be captured as a CUDA graph."""
    return device.type == "cuda" and not subnet.config.n_expert and subnet.config.sliding_window_size is None


class _DecodingGraph:
    """A decoding step, captured as a CUDA graph, which attends to the whole KV cache.

    Args:
        model: The model, with a KV cache.
        batch_size: Sequences per batch.
        position: Position at which the step is captured; its entry in the KV cache is overwritten.
    """

    def __init__(self, model: GPT, batch_size: int, position: int) -> None:
        self.token = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.cos.device)
        self.position = torch.full((1,), position, device=model.cos.device)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # libraries allocate their workspaces before the capture
            for _ in range(3):
                self._step(model)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.next = self._step(model)

    def _step(self, model: GPT) -> torch.Tensor:
        return model(self.token, self.position)[:, -1:].argmax(-1)

    def __call__(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Return the most likely token after `token` at `position`, as `_next_token` does; shape (B, 1)."""
        self.token.copy_(token)
        self.position.fill_(position)
        self.graph.replay()
        self.next.tolist()
        return self.next


def _window(model: GPT) -> int:
    """Return the maximum number of tokens that the caches of all layers accept at a time."""
    caches = (block.attn.kv_cache for block in model.transformer.h)
    return min(cache.max_cache_len for cache in caches if cache is not None)  # None for a dropped attention
