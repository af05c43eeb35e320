"""`litgpt prune`: sparsify a checkpoint's linear layers; the result is a litgpt checkpoint with exact zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning as L
import torch
from litgpt.config import Config
from litgpt.data import DataModule

from litgpt_whittle.batches import (
    Batch,
    read_calibration,
    validation_batches,
)
from litgpt_whittle.checkpoint import (
    WEIGHTS,
    save_checkpoint,
    weights_fingerprint,
)
from litgpt_whittle.command_config import as_command
from litgpt_whittle.commands.prune_base import PruneBase, measure_perplexity
from litgpt_whittle.contrib.prune import Pruner, Sparsity
from litgpt_whittle.contrib.prune.plots import plot_pruning
from litgpt_whittle.contrib.prune.pruning import MapReport, Pruning, maps_to_prune
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_space
from litgpt_whittle.hints import try_next
from litgpt_whittle.processes import lock_output, release_memory
from litgpt_whittle.registry import lookup, version, with_settings
from litgpt_whittle.results import Checkpoint
from litgpt_whittle.scratch import scratch_beside
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, pad
from litgpt_whittle.training.model_source import BASIS, ModelSource

GROUP = "litgpt_whittle.pruners"
NOTES = "pruning.yaml"
"""Name of the file that records the settings and results of the pruning"""


@dataclass
class PruneConfig(PruneBase):
    """Sparsify a checkpoint's linear layers.

    Prunes the linear layers inside the blocks, one block at a time. Each block is calibrated on the outputs of the
    pruned blocks before it.
    """

    out_dir: Path = Path("out/prune")
    """Directory of the pruned checkpoint, ``pruning.yaml`` and ``pruning.png``."""
    method: str | dict[str, dict[str, Any]] = "sparsegpt"
    """Pruning method, by its name in ``litgpt_whittle.pruners``, or the name with settings: ``magnitude`` drops a
    layer's smallest weights; ``wanda`` drops, for each output, the smallest products of weight and input;
    ``sparsegpt`` also updates the remaining weights (``{sparsegpt: {damp: 0.01, block_size: 128}}``)."""
    sparsity: float | None = None
    """Fraction of weights to set to zero; 0.5 if neither this nor ``pattern`` is given."""
    pattern: str | int | None = None
    """Keep N of every M weights along the input dimension, such as ``4:8`` or ``2:4``, which GPUs multiply faster."""
    targets: str = "attn,mlp"
    """Linear layers to prune, separated by commas: ``attn``, ``mlp``, or kinds of linear layers such as ``attn.qkv``
    and ``mlp.experts.proj``."""
    refit: bool = False
    """After pruning, refit the remaining weights of each linear layer in closed form to the layer's old outputs."""
    data: DataModule | None = None
    """Data for calibration and for measuring perplexity: any litgpt data module, or
    ``--data HFText --data.path PATH``. Only magnitude works without data."""
    tokens: int = 65_536
    """Number of calibration tokens, from the training split."""

    def validate(self) -> None:
        pruner = self.pruner
        if self.tokens < 1:
            raise UserError(f"tokens must be at least 1, got {self.tokens}; 65536 suit small models")
        if self.data is None and (self.refit or pruner.reads_data):
            what = "refit" if self.refit else f"the method {next(iter(self.method_settings))}"
            raise UserError(f"{what} needs data to calibrate on; for example --data HFText --data.path PATH")
        super().validate()

    @property
    def method_settings(self) -> dict[str, Any]:
        """The method's name with all of its settings."""
        return with_settings(GROUP, self.method, "method", n_given=1)

    @property
    def pruner(self) -> Pruner:
        """The pruning method.

        Raises:
            UserError: If the method, its settings or the sparsity are invalid.
        """
        ((name, settings),) = self.method_settings.items()
        return lookup(GROUP, name)(Sparsity.parse(self.sparsity, self.pattern), **settings)

    def run(self) -> Checkpoint:
        """Prune the checkpoint.

        Raises:
            UserError: For the first invalid argument, before anything expensive starts.
        """
        with lock_output(self.out_dir):
            self.validate()
            model = ModelSource.choose(self.checkpoint_dir, None, None, None, None)
            assert model.weights is not None  # a checkpoint has weights
            shape, weights = _shape(model), model.weights()
            names = [name.strip() for name in self.targets.split(",")]
            maps = maps_to_prune(shape, names, self.pruner.sparsity)
            n_bytes = sum(weight.numel() * weight.element_size() for weight in weights.values())
            check_space(self.out_dir, n_bytes, "the checkpoint")
            device = L.Fabric(devices=1).device
            windows, batches = self._read(model.config)
            before = measure_perplexity(self.checkpoint_dir, None, batches, device)
            release_memory()  # of the model
            notes = self._notes(windows)
            inputs = {"weights": weights_fingerprint(self.checkpoint_dir), **notes}
            scratch = scratch_beside(self.out_dir, "prune", torch.empty(0) if windows is None else windows, inputs)
            size = self.train.micro_batch_size
            scratch.device = device
            pruning = Pruning(shape, weights, maps, self.pruner, scratch, windows, size, self.refit)
            pruned, reports = pruning.run()
            after = measure_perplexity(
                self.checkpoint_dir, pruned if shape.is_uniform else pad(shape, pruned), batches, device
            )
            unseen = [f"{report.name} of layer {report.layer}" for report in reports if not report.saw_tokens]
            notes |= {"perplexity_before": before, "perplexity": after, "saw_no_tokens": unseen if batches else None}
            notes |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "litgpt_whittle": version()}
            extra = None if model.basis is None else {BASIS: {"basis": model.basis}}
            whole, texts = model.config if shape.is_uniform else shape, {NOTES: notes}
            save_checkpoint(self.out_dir.resolve(), whole, pruned, self.checkpoint_dir, model.sub_network, extra, texts)
            if batches:
                plot_pruning(reports, self.out_dir / "pruning.png")
            scratch.remove()
        return Checkpoint(self.out_dir, summary=_summary(reports, notes, self.out_dir))

    def _read(self, config: Config) -> tuple[torch.Tensor | None, list[Batch]]:
        """Return the calibration windows and the validation batches; None and an empty list without data."""
        if self.data is None:
            return None, []
        length, size = self.length, self.train.micro_batch_size
        windows = read_calibration(
            self.data, self.checkpoint_dir, size, length, self.tokens, self.seed, "tokens"
        ).input_ids
        check_space(self.out_dir, 2 * 4 * windows.numel() * config.n_embd, "the scratch files")
        return windows, validation_batches(self.data, length, self.eval.max_iters)

    def _notes(self, windows: torch.Tensor | None) -> dict[str, Any]:
        sparsity = self.pruner.sparsity
        return {
            "checkpoint_dir": str(self.checkpoint_dir.absolute()),
            "method": self.method_settings,
            "pattern" if self.pattern else "sparsity": str(sparsity) if self.pattern else sparsity.share,
            "targets": self.targets,
            "refit": self.refit,
            "data": None if self.data is None else type(self.data).__name__,
            "tokens": 0 if windows is None else windows.numel(),
            "seed": self.seed,
        }


setup = as_command(PruneConfig)


def _shape(model: ModelSource) -> SubNet:
    """Return the model's shape without padding; its layers may differ in size."""
    with torch.device("meta"):
        built = model.build()
    return built.shape if isinstance(built, LayerwiseGPT) else SubNet.full(model.config)


def _summary(reports: Sequence[MapReport], notes: Mapping[str, Any], out_dir: Path) -> str:
    """Return a readable summary of the pruning."""
    lines = [table(reports)]
    if notes["perplexity"] is not None:
        lines.append(f"perplexity {notes['perplexity_before']:.2f} -> {notes['perplexity']:.2f}")
    else:
        lines.append("Perplexity was not measured, because there is no data; add --data HFText --data.path PATH.")
    if unseen := notes["saw_no_tokens"]:
        lines.append(f"No token was routed to these, which were pruned by magnitude: {', '.join(unseen)}.")
    return "\n".join([*lines, f"Saved {out_dir / WEIGHTS}. {try_next('generate', out_dir)}"])


def table(reports: Sequence[MapReport]) -> str:
    """Return a text table of weights, zeros and mean output error by kind of linear layer."""
    lines = [f"{'linear layer':<24}{'weights':>16}{'zeros':>9}{'output error':>15}"]
    for kind in dict.fromkeys(report.kind for report in reports):
        lines.append(_row(kind, [report for report in reports if report.kind == kind]))
    return "\n".join([*lines, _row("all of them", reports)])


def _row(name: str, reports: Sequence[MapReport]) -> str:
    n_weights, n_zero = (sum(getattr(report, field) for report in reports) for field in ("n_weights", "n_zero"))
    errors = [report.error for report in reports if report.error is not None]
    error = f"{sum(errors) / len(errors):.4f}" if errors else "unknown"
    return f"{name:<24}{n_weights:>16,}{n_zero / n_weights:>9.2%}{error:>15}"
