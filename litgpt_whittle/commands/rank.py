"""`litgpt rank`: score a checkpoint's channels, heads, neurons, experts and layers by their importance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from jsonargparse import Namespace
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir, init_out_dir

from litgpt_whittle.batches import BatchArgs, check_seed, fingerprint, read_calibration, sequence_length
from litgpt_whittle.checkpoint import check_checkpoint, load_model, read_weights, weights_fingerprint
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.data.loading import check_data
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_writable
from litgpt_whittle.hints import try_next
from litgpt_whittle.plugin import save_hyperparameters
from litgpt_whittle.processes import lock_dir_for_all
from litgpt_whittle.ranking.ranking import FILE, Ranking
from litgpt_whittle.ranking.scores import LAYER_METRICS, METRICS, Scores, measure
from litgpt_whittle.reports.heat_map import LAYER_TITLES, plot_importance


def setup(
    checkpoint_dir: Path,
    data: DataModule | None = None,
    out_dir: Path = Path("out/rank"),
    metric: Literal["activation", "magnitude", "taylor"] = "activation",
    layer_metric: Literal["block_influence", "perplexity"] = "block_influence",
    tokens: int = 65_536,
    layer_tokens: int = 16_384,
    train: BatchArgs = BatchArgs(),
    precision: Literal["bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true", None] = None,
    overwrite: bool = False,
    seed: int = 42,
) -> None:
    """Rank a checkpoint's channels, heads, neurons, experts and layers by importance.

    Arguments:
        checkpoint_dir: The teacher's checkpoint directory.
        data: Data to measure importance on: the training split of any litgpt data module, or
            ``--data HFText --data.path PATH``.
        out_dir: Directory of ``importance.pt`` and ``importance.png``.
        metric: Metric that orders units: the size of their activations, the size of their weights, or the first-order
            change of the loss without them. All three are measured.
        layer_metric: Metric that orders layers: the change of the residual stream's direction, or the perplexity
            without the layer.
        tokens: Number of tokens to measure importance on.
        layer_tokens: Number of these tokens for the perplexity without a layer, measured once per layer; 0 skips it.
        train: Micro batch size and sequence length for the teacher. Smaller micro batches take less memory.
        precision: The precision to compute in. By default bf16-true on a GPU, 32-true elsewhere.
        overwrite: Replace the ranking in ``out_dir``.
        seed: Seed of the data order.
    """
    checkpoint_dir, out_dir = extend_checkpoint_dir(Path(checkpoint_dir)), init_out_dir(out_dir)
    teacher, length = check(Namespace(**locals()))
    check_writable(out_dir)
    with lock_dir_for_all(out_dir):
        if (out_dir / FILE).exists() and not overwrite:
            raise UserError(f"{str(out_dir)!r} holds a ranking already; choose another out_dir or add --overwrite true")
        precision = precision or ("bf16-true" if torch.cuda.is_available() else "32-true")
        fabric = L.Fabric(devices=1, precision=precision)
        windows = read_calibration(data, checkpoint_dir, train.micro_batch_size, length, tokens, seed, "tokens")
        dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
        model = load_model(checkpoint_dir, "SuperGPT", dtype=dtype, device=fabric.device)
        model.max_seq_length = length
        layer_windows = windows[: math.ceil(layer_tokens / windows.shape[1])]
        scores = measure(model, windows, len(layer_windows), train.micro_batch_size, fabric.autocast)
        if not all(units.is_finite for units in scores.units.values()):
            raise UserError(f"the scores are not finite in precision {precision}; use 32-true or bf16-true")
        provenance = {
            "weights": weights_fingerprint(checkpoint_dir),
            "data": fingerprint([(windows,)]),
            "tokens": windows.numel(),
            "layer_tokens": layer_windows.numel(),
            "precision": precision,
        }
        ranking = Ranking(teacher, scores, metric, layer_metric, provenance)
        out_dir.mkdir(parents=True, exist_ok=True)
        save_hyperparameters(setup, out_dir)
        ranking.save(out_dir / FILE)
        plot_importance(ranking, out_dir / "importance.png")
        print(table(scores, layer_metric))
        hint = try_next("search", checkpoint_dir, "--order", "importance", "--importance", out_dir / FILE)
        print(f"Ranking and heat map are in {out_dir}. {hint}")


def check(args: Namespace) -> tuple[Config, int]:
    """Run the checks that take no time; `litgpt whittle` runs them before its first stage.

    Args:
        args: The command's arguments, by name.

    Returns:
        The teacher's config, and the length of samples.

    Raises:
        UserError: For the first invalid setting.
    """
    check_seed(args.seed)
    teacher = check_checkpoint(args.checkpoint_dir)
    length = sequence_length(teacher, args.train.max_seq_length)
    if args.data is None:
        raise UserError("a ranking needs data to watch the teacher on; for example --data HFText --data.path PATH")
    if length < 2:
        raise UserError(f"train.max_seq_length must be at least 2, got {length}; raise it")
    for name, known in (("metric", METRICS), ("layer_metric", LAYER_METRICS)):
        if args[name] not in known:
            raise UserError(f"{name} must be one of {', '.join(known)}, got {args[name]!r}")
    for name, least in (("tokens", 1), ("layer_tokens", 0)):
        if args[name] < least:
            raise UserError(f"{name} must be at least {least}, got {args[name]}; raise it")
    if args.layer_metric == "perplexity" and not args.layer_tokens:
        raise UserError("layer_metric perplexity needs layer_tokens, got 0; 16384 suit most models")
    read_weights(args.checkpoint_dir)  # damaged weights fail before the data is read
    check_data(args.data, args.checkpoint_dir, teacher.padded_vocab_size)
    return teacher, length


def table(scores: Scores, layer_metric: str, n: int = 8) -> str:
    """Return a text table of the n least important layers."""
    order = scores.layers[layer_metric].argsort(stable=True).tolist()
    rows = [["least important layers", *(LAYER_TITLES[name] for name in scores.layers)]]
    for layer in order[:n]:
        rows.append([str(layer), *(_number(float(values[layer])) for values in scores.layers.values())])
    if scores.perplexity is not None:
        rows.append(["the whole teacher", "", _number(scores.perplexity)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _number(value: float) -> str:
    return f"{value:,.2f}" if 10 <= value < 1000 else f"{value:.3g}"
