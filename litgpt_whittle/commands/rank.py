"""`litgpt rank`: score a checkpoint's channels, heads, neurons, experts, layers and sub-layers by importance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import lightning as L
from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir, init_out_dir

from litgpt_whittle.batches import BatchArgs, fingerprint, read_calibration, sequence_length
from litgpt_whittle.checkpoint import check_checkpoint, load_model, read_weights, weights_fingerprint
from litgpt_whittle.command_config import CommandConfig, as_command
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.data.loading import check_data, packing_of
from litgpt_whittle.document_masks import reset_attention
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_writable
from litgpt_whittle.hints import try_next
from litgpt_whittle.plugin import save_hyperparameters
from litgpt_whittle.processes import lock_dir_for_all
from litgpt_whittle.ranking.ranking import FILE, Ranking
from litgpt_whittle.ranking.scores import LAYER_METRICS, METRICS, Scores, measure
from litgpt_whittle.reports.heat_map import layer_columns, plot_importance
from litgpt_whittle.results import RankResult
from litgpt_whittle.setting_checks import check_seed
from litgpt_whittle.tensors import default_precision, weights_dtype


@dataclass
class RankConfig(CommandConfig):
    """Rank a checkpoint's channels, heads, neurons, experts, layers and sub-layers by importance."""

    FREE: ClassVar[frozenset[str]] = frozenset(("out_dir", "overwrite", "data.init_args.num_workers"))

    checkpoint_dir: Path
    """The teacher's checkpoint directory."""
    data: DataModule | None = None
    """Data to measure importance on: the training split of any litgpt data module, or
    ``--data HFText --data.path PATH``."""
    out_dir: Path = Path("out/rank")
    """Directory of ``importance.pt`` and ``importance.png``."""
    metric: Literal["activation", "magnitude", "taylor"] = "activation"
    """Metric that orders units: the size of their activations, the size of their weights, or the first-order change of
    the loss without them. All three are measured."""
    layer_metric: Literal["block_influence", "perplexity"] = "block_influence"
    """Metric that orders layers: the change of the residual stream's direction, or the perplexity without the layer."""
    tokens: int = 65_536
    """Number of tokens to measure importance on."""
    layer_tokens: int = 16_384
    """Number of these tokens for the perplexity without each layer; 0 skips this measurement."""
    train: BatchArgs = field(default_factory=BatchArgs)
    """Micro batch size and sequence length for the teacher. Smaller micro batches take less memory."""
    precision: Literal["bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true", None] = None
    """The precision to compute in. By default bf16-true on a GPU, 32-true elsewhere."""
    overwrite: bool = False
    """Replace the ranking in ``out_dir``."""
    seed: int = 42
    """Seed of the data order."""

    def __post_init__(self) -> None:
        self.checkpoint_dir, self.out_dir = extend_checkpoint_dir(Path(self.checkpoint_dir)), init_out_dir(self.out_dir)

    def validate(self) -> None:
        check_seed(self.seed)
        teacher = check_checkpoint(self.checkpoint_dir)
        length = sequence_length(teacher, self.train.max_seq_length)
        if self.data is None:
            raise UserError("a ranking needs data to measure importance on; for example --data HFText --data.path PATH")
        if length < 2:
            raise UserError(f"train.max_seq_length must be at least 2, got {length}; raise it")
        choices = ("metric", self.metric, METRICS), ("layer_metric", self.layer_metric, LAYER_METRICS)
        for name, value, known in choices:
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, n, least in (("tokens", self.tokens, 1), ("layer_tokens", self.layer_tokens, 0)):
            if n < least:
                raise UserError(f"{name} must be at least {least}, got {n}; raise it")
        if self.layer_metric == "perplexity" and not self.layer_tokens:
            raise UserError("layer_metric perplexity needs layer_tokens, got 0; 16384 suit most models")
        read_weights(self.checkpoint_dir)  # damaged weights fail before the data is read
        check_data(self.data, self.checkpoint_dir, teacher.padded_vocab_size, can_reset_attention=True)

    def run(self) -> RankResult:
        """Rank the checkpoint, and save the ranking.

        Raises:
            UserError: For the first invalid argument, before anything expensive starts; or if a score is not finite.
        """
        self.validate()
        check_writable(self.out_dir)
        path = self.out_dir / FILE
        with lock_dir_for_all(self.out_dir):
            if path.exists() and not self.overwrite:
                raise UserError(
                    f"{str(self.out_dir)!r} holds a ranking already; choose another out_dir or add --overwrite true"
                )
            ranking = self._measure()
            self.out_dir.mkdir(parents=True, exist_ok=True)
            save_hyperparameters(setup, self.out_dir)
            ranking.save(path)
            plot_importance(ranking, self.out_dir / "importance.png")
        hint = try_next("search", self.checkpoint_dir, "--order", "importance", "--importance", path)
        lines = [table(ranking.scores, self.layer_metric), f"Ranking and heat map are in {self.out_dir}. {hint}"]
        return RankResult(self.out_dir, ranking, summary="\n".join(lines))

    def _measure(self) -> Ranking:
        assert self.data is not None, "validate has checked it"
        teacher, size = check_checkpoint(self.checkpoint_dir), self.train.micro_batch_size
        length = sequence_length(teacher, self.train.max_seq_length)
        precision = self.precision or default_precision()
        fabric = L.Fabric(devices=1, precision=precision)
        windows = read_calibration(self.data, self.checkpoint_dir, size, length, self.tokens, self.seed, "tokens")
        model = load_model(self.checkpoint_dir, "SuperGPT", dtype=weights_dtype(precision), device=fabric.device)
        model.max_seq_length = length
        reset_attention(model, packing_of(self.data, self.checkpoint_dir))
        ids = windows.input_ids
        layer_windows = ids[: math.ceil(self.layer_tokens / ids.shape[1])]
        scores = measure(model, ids, len(layer_windows), size, fabric.autocast, counts=windows.counts)
        if not all(units.is_finite for units in scores.units.values()):
            raise UserError(f"the scores are not finite in precision {precision}; use 32-true or bf16-true")
        provenance = {
            "weights": weights_fingerprint(self.checkpoint_dir),
            "data": fingerprint([(ids,)]),
            "tokens": ids.numel(),
            "layer_tokens": layer_windows.numel(),
            "precision": precision,
        }
        return Ranking(teacher, scores, self.metric, self.layer_metric, provenance)


setup = as_command(RankConfig)


def table(scores: Scores, layer_metric: str, n: int = 8) -> str:
    """Return a text table of the n least important layers by `layer_metric`."""
    order = scores.layers[layer_metric].argsort(stable=True).tolist()
    columns = layer_columns(scores)
    rows = [["least important layers", *columns]]
    for layer in order[:n]:
        rows.append([str(layer), *(_number(float(values[layer])) for values in columns.values())])
    if scores.perplexity is not None:
        rows.append(["the whole teacher", *[""] * (len(columns) - 1), _number(scores.perplexity)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _number(value: float) -> str:
    return f"{value:,.2f}" if 10 <= value < 1000 else f"{value:.3g}"
