"""How fast a sub-network reads a prompt and writes an answer, by the clock of the machine that it runs on."""

from __future__ import annotations

import contextlib
import io
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from litgpt.model import GPT

from litgpt_whittle.errors import UserError
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import student_model


class Latency(NamedTuple):
    """Seconds that a batch takes."""

    prefill: float
    """From the prompt to the first new token"""
    decode: float
    """For each further token"""


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
    """Times a student with random weights as it answers a prompt with the KV cache, as `litgpt generate` does.

    Prompts longer than the smallest sliding window are read in pieces of its size, which litgpt's cache demands. Each
    new token is the likeliest one and is fetched from the device before the next is computed.

    Args:
        subnet: What the student keeps.
        device: Where it runs.
        dtype: Of its weights, activations and KV cache.
        batch_size: Prompts that are answered at the same time.
        prompt_length: Tokens in each.
        new_tokens: Further tokens that are decoded, one by one.
        repeats: The median of so many runs counts; one more goes before, to warm up.

    Raises:
        UserError: If a number is below 1, or prompt and answer exceed the block size.
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
    runs = [_answer(model, prompt, new_tokens) for _ in range(repeats + 1)][1:]
    return Latency(*(median(seconds) for seconds in zip(*runs)))


def default_device() -> str:
    """A GPU or other accelerator where there is one, else the CPU."""
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def _random_student(subnet: SubNet, device: torch.device | str, dtype: torch.dtype, max_seq_length: int) -> GPT:
    """The student with weights that nothing has to be read or trained for."""
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


def _answer(model: GPT, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to read the prompts, shape (B, T), and per further token."""
    started = perf_counter()
    token = _next_token(model, prompt, 0)
    prefilled = perf_counter()
    for position in range(prompt.size(1), prompt.size(1) + new_tokens):
        token = _next_token(model, token, position)
    return prefilled - started, (perf_counter() - prefilled) / new_tokens


def _next_token(model: GPT, idx: torch.Tensor, position: int) -> torch.Tensor:
    """The likeliest token after `idx`, shape (B, T), whose first one is at `position`; shape (B, 1)."""
    for piece in idx.split(_window(model), dim=1):
        end = position + piece.size(1)
        input_pos = torch.arange(position, end, device=idx.device)
        logits = model(piece, input_pos, input_pos_maxp1=end)  # (B, T, V)
        position = end
    token = logits[:, -1:].argmax(-1)
    token.tolist()  # waits for the device
    return token


def _window(model: GPT) -> int:
    """The most tokens that all layers' caches take at a time."""
    return min(block.attn.kv_cache.max_cache_len for block in model.transformer.h)
