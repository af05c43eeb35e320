"""Small models, spaces, tokens and scores that the checks share; everything runs on a CPU within seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from litgpt.config import Config

from litgpt_whittle.batches import Batch
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.ranking.scores import Scores, UnitScores
from litgpt_whittle.subnet import layer_sizes
from litgpt_whittle.supergpt import SuperGPT
from litgpt_whittle.tasks import Document, Task, TaskSet
from litgpt_whittle.tasks.batches import Continuation
from litgpt_whittle.tensors import IGNORE_INDEX

LEAN = Config.from_name(
    "pythia-14m", n_layer=4, n_embd=32, n_head=4, intermediate_size=64, block_size=32, padded_vocab_size=64
)
"""A teacher with a small vocabulary, so that channels do not dominate the parameter count"""


def super_network(config: Config) -> SuperGPT:
    """Return a teacher with random weights, a vocabulary of 61 tokens, and predictions far from uniform."""
    torch.manual_seed(0)
    model = SuperGPT(dataclasses.replace(config, padded_vocab_size=64, vocab_size=61)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def random_tokens(sizes: Sequence[int], length: int, seed: int = 1) -> list[torch.Tensor]:
    """Return batches of random token ids of the vocabulary of `super_network`, of shape (size, length) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 61, (size, length), generator=generator) for size in sizes]


def random_batches(length: int = 16) -> list[Batch]:
    """Return batches of different sizes; in one of them, the last quarter of the targets of each window is ignored."""
    batches = [Batch(ids[:, :-1], ids[:, 1:].clone()) for ids in random_tokens((4, 3, 1), length + 1)]
    batches[1].targets[:, length - length // 4 :] = IGNORE_INDEX
    return batches


def random_ranking(config: Config, seed: int = 0, **provenance) -> Ranking:
    """Return a ranking of a teacher's units with random scores."""
    generator = torch.Generator().manual_seed(seed)

    def scores(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    layers = ({name: scores(size) for name, size in layer_sizes(config, i).items()} for i in range(config.n_layer))
    units = UnitScores(scores(config.n_layer + 1, config.n_embd), tuple(layers))
    found = Scores({"activation": units}, {"block_influence": scores(config.n_layer)}, None)
    return Ranking(config, found, "activation", "block_influence", provenance)


class MostLikely:
    """Task in lm-eval's form whose answer 0 is correct."""

    def process_results(self, doc: Any, found: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """Return the accuracy: 1 if no answer is more likely than the first."""
        return {"acc": float(found[0] == max(found))}


def random_tasks(length: int = 16) -> TaskSet:
    """Return two tasks of random tokens: eight questions with two answers each."""
    contexts, answers = (torch.cat(random_tokens((16,), n, seed)).tolist() for n, seed in ((length - 4, 3), (4, 4)))
    # both answers of a question have its context, and different lengths
    continuations = [Continuation(contexts[i // 2], answer[: 1 + i % 4]) for i, answer in enumerate(answers)]
    documents = [
        Document(MostLikely(), {}, "acc", range(i, i + 2), np.ones(2), np.array([True, False])) for i in range(0, 16, 2)
    ]
    return TaskSet([Task("one", documents[:5]), Task("other", documents[5:])], continuations, length)


def random_logits(n: int, vocab_size: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Return normally distributed logits in float64, shape (n, vocab_size)."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, vocab_size, generator=generator, dtype=torch.float64)
