"""File `importance.pt` of `litgpt rank`: a teacher's scores, and the order of its units that follows from them."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.ranking.order import Order
from litgpt_whittle.ranking.scores import Scores, UnitScores
from litgpt_whittle.subnet import fingerprint
from litgpt_whittle.tensors import save_tensors

VERSION = 1
FILE = "importance.pt"


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores of a teacher, and the metrics that define its order."""

    teacher: Config
    scores: Scores
    metric: str
    """Metric that orders units"""
    layer_metric: str
    """Metric that orders layers"""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Plain values that identify the weights and the calibration data"""

    @cached_property
    def order(self) -> Order:
        """The order with the most important units first."""
        units = self.scores.units[self.metric]
        own = tuple({name: scores.numpy() for name, scores in layer.items()} for layer in units.layers)
        layers = self.scores.layers[self.layer_metric]
        sublayers = {part: influence.numpy() for part, influence in self.scores.sublayers.items()}
        return Order.by(self.teacher, units.n_embd.sum(0).numpy(), layers.numpy(), own, sublayers)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that identify the order."""
        digest = hashlib.sha256()
        units = (x for own in (*self.order.layers, self.order.sublayers) for x in own.values())
        for order in (self.order.n_embd, self.order.n_layer, *units):
            digest.update(order.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def scores_fingerprint(self) -> str:
        """Sixteen hex digits that identify the scores; different scores can give the same order."""
        digest = hashlib.sha256(f"{self.metric} {self.layer_metric}".encode())
        units = self.scores.units[self.metric]
        own = [layer[name] for layer in units.layers for name in sorted(layer)]
        for scores in (units.n_embd, *own, *(self.scores.layers[name] for name in sorted(self.scores.layers))):
            digest.update(scores.numpy().astype("<f8").tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Save the ranking atomically, by writing a temporary file and renaming it."""
        units = {
            metric: {"n_embd": scores.n_embd, "layers": list(scores.layers)}
            for metric, scores in self.scores.units.items()
        }
        content = {
            "version": VERSION,
            "teacher": self.teacher.name,
            "teacher_config": fingerprint(self.teacher),
            "metric": self.metric,
            "layer_metric": self.layer_metric,
            "units": units,
            "layers": self.scores.layers,
            "sublayers": self.scores.sublayers,
            "perplexity": self.scores.perplexity,
            "provenance": self.provenance,
        }
        beside = path.with_name(f".{path.name}.new")
        try:
            save_tensors(content, beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)  # after a failure

    @classmethod
    def load(cls, path: Path, teacher: Config) -> Ranking:
        """Load the ranking of `teacher`; `path` may be the file or its folder.

        Raises:
            UserError: If the file is missing, damaged, of another version, or for another architecture.
        """
        path = path / FILE if path.is_dir() else path
        content = _read(path)
        if content["teacher_config"] != fingerprint(teacher):
            raise UserError(
                f"{str(path)!r} ranks {content['teacher']!r} ({content['teacher_config']}), not {teacher.name!r} "
                f"({fingerprint(teacher)}); name the checkpoint that it was made for, or rank this one"
            )
        units = {
            metric: UnitScores(scores["n_embd"], tuple(scores["layers"])) for metric, scores in content["units"].items()
        }
        # rankings of earlier versions have no scores of sub-layers
        scores = Scores(units, content["layers"], content["perplexity"], content.get("sublayers", {}))
        return cls(teacher, scores, content["metric"], content["layer_metric"], content["provenance"])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no {str(path)!r}; create it with 'litgpt rank'")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError):
        raise UserError(f"{str(path)!r} is damaged, or not a file of 'litgpt rank'; create it again") from None
    if not isinstance(content, dict) or not {"version", "metric", "units"} <= set(content):
        raise UserError(f"{str(path)!r} is not a file of 'litgpt rank'; name its {FILE}")
    if content["version"] != VERSION:
        raise UserError(f"{str(path)!r} has format {content['version']}, this version reads {VERSION}; rank again")
    return content
