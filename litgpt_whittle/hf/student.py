"""The checkpoint to export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config

from litgpt_whittle.checkpoint import check_checkpoint, read_hf_config, read_model_class, read_weights
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.subnet import SubNet, read_choice
from litgpt_whittle.supergpt import is_tied


@dataclass(frozen=True)
class Student:
    """A litgpt checkpoint, with memory-mapped weights."""

    checkpoint_dir: Path
    config: Config
    """Config of the stored weights, which are padded with zeros if layers differ"""
    shape: SubNet
    """The true shape, as a sub-network of `config`"""
    weights: Mapping[str, torch.Tensor]
    """The stored weights"""
    hf_config: dict[str, Any]
    """Content of the teacher's `config.json`; empty if unknown"""

    @classmethod
    def open(cls, checkpoint_dir: Path) -> Student:
        """Open a checkpoint directory.

        Raises:
            UserError: If it is not a litgpt checkpoint, or if one of its files cannot be read.
        """
        config = check_checkpoint(checkpoint_dir)
        shape = SubNet.from_dict(config, read_model_class(checkpoint_dir).get("shape", {}))
        return cls(checkpoint_dir, config, shape, read_weights(checkpoint_dir), read_hf_config(checkpoint_dir))

    @cached_property
    def tied(self) -> bool:
        """True if the LM head is tied to the embedding."""
        return is_tied(self.weights)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.weights["lm_head.weight"].dtype

    @cached_property
    def n_params(self) -> int:
        """Number of parameters, without padding."""
        return n_params(self.config, self.shape, self.tied)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Origin of the student, from its `sub_network.yaml`; empty if unknown."""
        path = self.checkpoint_dir / "sub_network.yaml"
        return (read_choice(path).get("provenance") or {}) if path.is_file() else {}
