"""Language model fine-tuned to predict scores from text descriptions of sub-networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.processes import own_device
from litgpt_whittle.ranking.ranking import Ranking
from litgpt_whittle.surrogates.args import SurrogateArgs
from litgpt_whittle.surrogates.base import Regressor
from litgpt_whittle.surrogates.features import Choice, Features

BATCH_SIZE = 16


class Text(Regressor):
    """Hugging Face model for sequence classification with one output, fine-tuned on descriptions of sub-networks.

    Every fit starts from the named model, so that predictions depend only on the examples. Descriptions contain the
    numbers of kept units, not their indices.

    Args:
        args: The settings.

    Raises:
        UserError: If no model is named, or it cannot be loaded.
    """

    n_folds = 2  # each fold fine-tunes a model

    def __init__(self, args: SurrogateArgs) -> None:
        super().__init__(args)
        if args.model is None:
            raise UserError("surrogate.kind text needs --surrogate.model, a Hugging Face model's folder or name")
        self.name = args.model
        self.model, self.tokenizer = self._load(seed=0)

    def read(self, teacher: Config, choices: Sequence[Choice], ranking: Ranking | None = None) -> list[str]:
        """Return a description of each sub-network."""
        return describe(teacher, choices)

    def fit(self, known: Sequence[str], targets: np.ndarray, seed: int) -> None:
        """Fine-tune the named model with the mean squared error."""
        self.model, _ = self._load(seed)
        device = own_device()
        model = self.model.to(device).train()
        rows = self._tokens(known)
        wanted = torch.tensor(targets, dtype=torch.float32, device=device)
        n_batches = math.ceil(len(rows) / BATCH_SIZE)
        n_steps = n_batches * self.args.epochs
        n_warmup = max(n_steps // 10, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.args.learning_rate, weight_decay=0.01)
        factor = lambda step: min((step + 1) / n_warmup, (n_steps - step) / max(n_steps - n_warmup, 1))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        rng = np.random.default_rng(seed)
        with _seeded(seed):
            for _ in range(self.args.epochs):
                for batch in np.array_split(rng.permutation(len(rows)), n_batches):
                    expected = model(**self._padded([rows[i] for i in batch], device)).logits.squeeze(1)
                    loss = torch.nn.functional.mse_loss(expected.float(), wanted[torch.from_numpy(batch).to(device)])
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()

    @torch.inference_mode()
    def predict(self, unknown: Sequence[str]) -> np.ndarray:
        """Return the model's outputs, shape (n,)."""
        self.model.eval()
        rows, device = self._tokens(unknown), self.model.device
        parts = [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)]
        found = [self.model(**self._padded(part, device)).logits.squeeze(1).cpu().double() for part in parts]
        return torch.cat(found).numpy()

    def save(self, folder: Path) -> bool:
        """Save the model (as safetensors) and the tokenizer, in a folder that `surrogate.model` accepts."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return True

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize descriptions; raise UserError if a description exceeds the model's context length."""
        rows = self.tokenizer(list(texts), verbose=False)["input_ids"]
        most, limit = max(map(len, rows)), getattr(self.model.config, "max_position_embeddings", None) or math.inf
        if most > limit:
            raise UserError(
                f"surrogate.model {self.args.model!r} has a context of {limit} tokens, a description of a sub-network "
                f"needs {most}; choose a model with a longer context"
            )
        return rows

    def _padded(self, rows: list[list[int]], device: torch.device | str) -> Mapping[str, torch.Tensor]:
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(device)

    def _load(self, seed: int) -> tuple[Any, Any]:
        """Load the named model with one output, and its tokenizer."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # no warning about the new weights of the output, which are trained next
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name)
            with _seeded(seed):
                # safetensors only: other weight files are pickles
                model = AutoModelForSequenceClassification.from_pretrained(
                    self.name, num_labels=1, problem_type="regression", use_safetensors=True
                )
        except Exception as error:  # exceptions of many types: a missing folder, an unknown architecture, a wrong size
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UserError(
                f"surrogate.model {self.args.model!r} cannot be loaded for sequence classification ({reason}); "
                "choose another model"
            ) from None
        finally:
            logging.set_verbosity(verbosity)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer


def describe(teacher: Config, choices: Sequence[Choice]) -> list[str]:
    """Describe sub-networks in percent of the teacher, so that descriptions mean the same for any teacher.

    For example `width 58 head 100 | heads 50 neurons 39 | - | heads 100 neurons 20`: channels and head size, then one
    part per layer of the teacher, `-` for a dropped layer. Groups and experts are included only if the teacher has
    grouped heads or experts.
    """
    features = Features(teacher)
    read = features.read(choices)
    named = {"heads": True, "neurons": True, "groups": teacher.n_query_groups < teacher.n_head}
    named["experts"] = bool(teacher.n_expert)
    shares = {name: (100 * share).tolist() for name, share in features.shares(read).items() if named[name]}
    texts = []
    for row, is_kept in enumerate(read.is_kept):
        width, head = read.n_embd[row] / teacher.n_embd, read.head_size[row] / teacher.head_size
        parts = [f"width {100 * width:.0f} head {100 * head:.0f}"]
        for layer, kept in enumerate(is_kept):
            words = (f"{name} {share[row][layer]:.0f}" for name, share in shares.items() if share[row][layer])
            parts.append(" ".join(words) if kept else "-")
        texts.append(" | ".join(parts))
    return texts


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's global generators (new weights, dropout), use deterministic algorithms, and restore both."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_deterministic)
