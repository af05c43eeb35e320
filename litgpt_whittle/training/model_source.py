"""Source of the trained model: a checkpoint, a sub-network sliced from its teacher, or random weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import num_parameters

from litgpt_whittle.checkpoint import check_checkpoint, load_model, read_model_class, read_weights
from litgpt_whittle.errors import UserError
from litgpt_whittle.processes import is_first_started
from litgpt_whittle.subnet import SubNet, read_choice
from litgpt_whittle.supergpt import LayerwiseGPT, extract_weights, is_tied, student_model
from litgpt_whittle.windows import vectorize_windows

logger = logging.getLogger(__name__)

BASIS = "basis.pth"
"""File with the matrix that expresses a repaired student's channels as linear combinations of the teacher's, shape
(n_embd_student, n_embd_teacher)"""


@dataclass
class ModelSource:
    """Source of the trained model, whose weights are not loaded yet."""

    config: Config
    build: Callable[[], GPT]
    """Makes the model, with arbitrary weights"""
    weights: Callable[[], Mapping[str, torch.Tensor]] | None = None
    """Reads the weights; `None` for random weights"""
    sub_network: dict[str, Any] | None = None
    """Content of the student's `sub_network.yaml`: its layers and units within the teacher; None if it has none"""
    basis: torch.Tensor | None = None
    """Student's channels as linear combinations of the teacher's, shape (n_embd_student, n_embd_teacher); None if they
    are a selection of them"""
    is_tied: bool = False
    """True if the LM head shares the embedding matrix, which is then trained and saved once"""
    weights_dir: Path | None = None
    """Checkpoint directory that the weights come from, whose license holds for the student"""

    @property
    def n_params(self) -> int:
        """Number of parameters, with the actual sizes of each layer; a tied matrix counts once."""
        with torch.device("meta"):
            model = self.build()
        return num_parameters(model) - (model.lm_head.weight.numel() if self.is_tied else 0)

    @classmethod
    def choose(
        cls,
        checkpoint_dir: Path | None,
        sub_network: Path | None,
        teacher_dir: Path | None,
        model_name: str | None,
        model_config: Config | None,
    ) -> ModelSource:
        """Return the student that the arguments define.

        A checkpoint takes precedence over a sub-network, and a sub-network over a model's config or name.

        Raises:
            UserError: If no student is given, or if it does not exist.
        """
        if checkpoint_dir is not None:
            return cls._from_checkpoint(checkpoint_dir)
        if sub_network is not None:
            return cls._cut(sub_network, teacher_dir)
        if model_config is None and model_name is None:
            raise UserError(
                "there is no student; set --initial_checkpoint_dir to an extracted checkpoint, --sub_network to a "
                "sub-network of the teacher, or --model_name to start from random weights"
            )
        if model_config is None:
            try:
                model_config = Config.from_name(model_name)
            except ValueError:
                raise UserError(
                    f"model_name must be a litgpt model, got {model_name!r}; see --model_name list"
                ) from None
        return cls(model_config, lambda: vectorize_windows(GPT(model_config)))

    def with_random_weights(self) -> ModelSource:
        """Return the same architecture with random weights; a tied LM head stays tied."""
        shape = self.sub_network and {name: value for name, value in self.sub_network.items() if name != "provenance"}
        return replace(self, weights=None, sub_network=shape, basis=None)

    def with_tie(self, tie_embeddings: bool | None) -> ModelSource:
        """Return the student with LM head and embedding tied or untied; untying logs the sizes before and after.

        Args:
            tie_embeddings: `train.tie_embeddings`; `None` changes nothing.

        Raises:
            UserError: If a trained LM head would be dropped.
        """
        if tie_embeddings is None or tie_embeddings == self.is_tied:
            return self
        if tie_embeddings and self.weights is not None:
            raise UserError(
                "train.tie_embeddings must not be true for a student whose LM head differs from its embedding, because "
                "training would drop the head; leave --train.tie_embeddings out"
            )
        changed = replace(self, is_tied=tie_embeddings)
        if tie_embeddings:
            return changed
        n = changed.n_params
        if is_first_started():
            logger.info(f"train.tie_embeddings false unties the LM head: {self.n_params:,} parameters become {n:,}")
        shape = self.sub_network or {}
        origin = shape.get("provenance")
        if origin and "n_params" in origin:
            changed.sub_network = {**shape, "provenance": origin | {"n_params": n}}
        return changed

    @classmethod
    def _from_checkpoint(cls, checkpoint_dir: Path) -> ModelSource:
        config, named = check_checkpoint(checkpoint_dir), read_model_class(checkpoint_dir)
        path = checkpoint_dir / "sub_network.yaml"
        known = read_choice(path) if path.is_file() else None
        basis = _read_basis(checkpoint_dir / BASIS)
        if not named:
            tied = is_tied(read_weights(checkpoint_dir))
            read = partial(read_weights, checkpoint_dir)
            return cls(config, lambda: vectorize_windows(GPT(config)), read, known, basis, tied, checkpoint_dir)
        opened = load_model(checkpoint_dir)

        def build() -> GPT:
            if isinstance(opened, LayerwiseGPT):
                return LayerwiseGPT(opened.shape)
            return vectorize_windows(type(opened)(config))

        return cls(config, build, opened.state_dict, known, basis, is_tied(opened.state_dict()), checkpoint_dir)

    @classmethod
    def _cut(cls, sub_network: Path, teacher_dir: Path | None) -> ModelSource:
        """Return the student that is sliced out of the teacher, without repair."""
        if teacher_dir is None:
            raise UserError("sub_network needs the teacher that it is cut from; set --teacher_checkpoint_dir")
        subnet = SubNet.load(sub_network, check_checkpoint(teacher_dir))
        return cls(
            subnet.config,
            lambda: student_model(subnet),
            lambda: extract_weights(read_weights(teacher_dir), subnet),
            subnet.to_dict(),
            is_tied=is_tied(read_weights(teacher_dir)),
            weights_dir=teacher_dir,
        )


def _read_basis(path: Path) -> torch.Tensor | None:
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["basis"]
    except Exception as error:
        raise UserError(f"{str(path)!r} cannot be read ({type(error).__name__}); extract the student again") from None
