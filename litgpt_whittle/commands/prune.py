"""`litgpt prune`: sparsify a checkpoint's linear layers; the result is a litgpt checkpoint with exact zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning as L
import torch
from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.batches import (
    Batch,
    BatchArgs,
    BudgetArgs,
    check_seed,
    read_calibration,
    sequence_length,
    validation_batches,
)
from litgpt_whittle.checkpoint import (
    WEIGHTS,
    check_checkpoint,
    load_model,
    save_checkpoint,
    weights_fingerprint,
)
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.data.loading import check_data
from litgpt_whittle.errors import UserError
from litgpt_whittle.figures.curves import plot_pruning
from litgpt_whittle.files import check_out_dir, check_space
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.hints import try_next
from litgpt_whittle.processes import locks_output, release_memory
from litgpt_whittle.pruners import Pruner, Sparsity
from litgpt_whittle.pruners.pruning import MapReport, Pruning, maps_to_prune
from litgpt_whittle.registry import lookup, version, with_settings
from litgpt_whittle.scratch import scratch_beside
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, Weights, pad
from litgpt_whittle.training.model_source import BASIS, ModelSource

GROUP = "litgpt_whittle.pruners"
NOTES = "pruning.yaml"
"""Name of the file that records the settings and results of the pruning"""


@locks_output
def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/prune"),
    method: str | dict[str, dict[str, Any]] = "sparsegpt",
    sparsity: float | None = None,
    pattern: str | int | None = None,
    targets: str = "attn,mlp",
    refit: bool = False,
    data: DataModule | None = None,
    tokens: int = 65_536,
    train: BatchArgs = BatchArgs(),
    eval: BudgetArgs = BudgetArgs(),
    overwrite: bool = False,
    seed: int = 42,
) -> None:
    """Sparsify a checkpoint's linear layers.

    Prunes the linear layers inside the blocks, one block at a time, on the outputs of the pruned blocks before it.

    Arguments:
        checkpoint_dir: The checkpoint directory.
        out_dir: Directory of the pruned checkpoint, ``pruning.yaml`` and ``pruning.png``.
        method: Pruning method, by its name in ``litgpt_whittle.pruners``, or the name with settings: ``magnitude``
            drops a layer's smallest weights; ``wanda`` drops, for each output, the smallest products of weight and
            input; ``sparsegpt`` also updates the remaining weights (``{sparsegpt: {damp: 0.01, block_size: 128}}``).
        sparsity: Fraction of weights that become zero; 0.5 if there is no pattern either.
        pattern: Keep N of every M weights along the inputs: ``2:4``, which GPUs multiply faster, ``4:8``, ….
        targets: Layers to prune, separated by commas: ``attn``, ``mlp``, or kinds of layers such as ``attn.qkv`` and
            ``mlp.experts.proj``.
        refit: Then refit each layer's remaining weights in closed form to the unpruned layer's outputs.
        data: Data for calibration and for measuring perplexity: any litgpt data module, or
            ``--data HFText --data.path PATH``. Only magnitude works without data.
        tokens: Number of calibration tokens, from the training split.
        train: Micro batch size and sequence length.
        eval: Number of validation batches for measuring perplexity.
        overwrite: Replace the checkpoint in ``out_dir``.
        seed: Seed of the data order.
    """
    checkpoint_dir, out_dir = extend_checkpoint_dir(Path(checkpoint_dir)), Path(out_dir)
    check_seed(seed)
    config = check_checkpoint(checkpoint_dir)
    method = with_settings(GROUP, method, "method", n_given=1)
    pruner = _make_pruner(method, Sparsity.parse(sparsity, pattern))
    if tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}; 65536 suit small models")
    if data is None and (refit or pruner.reads_data):
        what = "refit" if refit else f"the method {next(iter(method))}"
        raise UserError(f"{what} needs data to calibrate on; for example --data HFText --data.path PATH")
    check_data(data, checkpoint_dir, config.padded_vocab_size)
    check_out_dir(out_dir, overwrite, (checkpoint_dir,), WEIGHTS)
    model = ModelSource.choose(checkpoint_dir, None, None, None, None)
    assert model.weights is not None  # they are the checkpoint's
    shape, weights = _shape(model), model.weights()
    maps = maps_to_prune(shape, [name.strip() for name in targets.split(",")], pruner.sparsity)
    check_space(out_dir, sum(weight.numel() * weight.element_size() for weight in weights.values()), "the checkpoint")

    device = L.Fabric(devices=1).device
    length, size = sequence_length(config, train.max_seq_length), train.micro_batch_size
    windows, batches = None, []
    if data is not None:
        windows = read_calibration(data, checkpoint_dir, size, length, tokens, seed, "tokens")
        check_space(out_dir, 2 * 4 * windows.numel() * config.n_embd, "the scratch files")
        batches = validation_batches(data, length, eval.max_iters)
    before = _perplexity(checkpoint_dir, None, batches, device)
    release_memory()  # of the model
    notes: dict[str, Any] = {
        "checkpoint_dir": str(checkpoint_dir.absolute()),
        "method": method,
        "pattern" if pattern else "sparsity": str(pruner.sparsity) if pattern else pruner.sparsity.share,
        "targets": targets,
        "refit": refit,
        "data": None if data is None else type(data).__name__,
        "tokens": 0 if windows is None else windows.numel(),
        "seed": seed,
    }
    keys = [weights_fingerprint(checkpoint_dir), notes]
    scratch = scratch_beside(out_dir, "prune", torch.empty(0) if windows is None else windows, keys)
    pruned, reports = Pruning(shape, weights, maps, pruner, scratch, windows, size, refit, device).run()
    stored = pruned if shape.is_uniform else pad(shape, pruned)
    after = _perplexity(checkpoint_dir, stored, batches, device)
    unseen = [f"{report.name} of layer {report.layer}" for report in reports if not report.saw_tokens]
    notes |= {"perplexity_before": before, "perplexity": after, "saw_no_tokens": unseen if batches else None}
    notes |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "litgpt_whittle": version()}
    extra = None if model.basis is None else {BASIS: {"basis": model.basis}}
    whole = config if shape.is_uniform else shape
    save_checkpoint(out_dir.resolve(), whole, pruned, checkpoint_dir, model.sub_network, extra, {NOTES: notes})
    if batches:
        plot_pruning(reports, out_dir / "pruning.png")
    print(_summary(reports, notes, out_dir))
    scratch.remove()


def _make_pruner(method: Mapping[str, Mapping[str, Any]], sparsity: Sparsity) -> Pruner:
    ((name, settings),) = method.items()
    return lookup(GROUP, name)(sparsity, **settings)


def _shape(model: ModelSource) -> SubNet:
    """Return the model's true shape, whose layers may differ."""
    with torch.device("meta"):
        built = model.build()
    return built.shape if isinstance(built, LayerwiseGPT) else SubNet.full(model.config)


def _perplexity(
    checkpoint_dir: Path, weights: Weights | None, batches: Sequence[Batch], device: torch.device
) -> float | None:
    """Return the perplexity of the checkpoint, with other weights if given; None without batches."""
    if not batches:
        return None
    model = load_model(checkpoint_dir, "SuperGPT")
    if weights is not None:
        model.load_state_dict(weights, assign=True)
    # half precision is slow on CPUs
    model = model.to(device, torch.float32 if device.type == "cpu" else None)
    return Perplexity(model, batches)(SubNet.full(model.config))["perplexity"]


def _summary(reports: Sequence[MapReport], notes: Mapping[str, Any], out_dir: Path) -> str:
    """Return a readable summary of the pruning."""
    lines = [table(reports)]
    if notes["perplexity"] is not None:
        lines.append(f"perplexity {notes['perplexity_before']:.2f} -> {notes['perplexity']:.2f}")
    else:
        lines.append("Perplexity was not measured, for which there is no data; add --data HFText --data.path PATH.")
    if unseen := notes["saw_no_tokens"]:
        lines.append(f"No token was routed to these, which were pruned by magnitude: {', '.join(unseen)}.")
    return "\n".join([*lines, f"Saved {out_dir / WEIGHTS}. {try_next('generate', out_dir)}"])


def table(reports: Sequence[MapReport]) -> str:
    """Return a text table of weights, zeros and mean output error by kind of linear layer."""
    lines = [f"{'map':<24}{'weights':>16}{'zeros':>9}{'output error':>15}"]
    for kind in dict.fromkeys(report.kind for report in reports):
        lines.append(_row(kind, [report for report in reports if report.kind == kind]))
    return "\n".join([*lines, _row("all of them", reports)])


def _row(name: str, reports: Sequence[MapReport]) -> str:
    n_weights, n_zero = (sum(getattr(report, field) for report in reports) for field in ("n_weights", "n_zero"))
    errors = [report.error for report in reports if report.error is not None]
    error = f"{sum(errors) / len(errors):.4f}" if errors else "unknown"
    return f"{name:<24}{n_weights:>16,}{n_zero / n_weights:>9.2%}{error:>15}"
