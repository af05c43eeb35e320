"""Prune a model's linear layers block by block; each block receives the outputs of the pruned blocks before it.

The papers of Wanda and SparseGPT use the same procedure. A block's linear layers are pruned on their inputs in the
unpruned block; then the pruned block runs again to produce the next block's inputs. All calibration tokens are used.
Only moments are kept in memory (`litgpt_whittle.least_squares`); hidden states are kept in scratch files, and weights
are read block by block.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from litgpt.model import Block
from torch import nn
from tqdm import tqdm

from litgpt_whittle.blocks import NonBlockModules, load_student_block, read_block, read_outside, run_block
from litgpt_whittle.contrib.prune.base import Pruner, Sparsity
from litgpt_whittle.contrib.prune.magnitude import Magnitude
from litgpt_whittle.errors import UserError
from litgpt_whittle.least_squares import Moments, exact_products, no_outputs, solve
from litgpt_whittle.scratch import Scratch
from litgpt_whittle.student_block import student_block
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import Weights

REFIT_RIDGE = 1e-3
"""Ridge that draws refitted weights towards their old values, relative to the mean squares of the inputs"""


@dataclass(frozen=True)
class MapReport:
    """Result of pruning one linear layer."""

    layer: int
    """Index of the block"""
    name: str
    """Name within the block"""
    n_zero: int
    n_weights: int
    error: float | None
    """‖(W' − W) X‖² / ‖W X‖² on the calibration inputs X; None without calibration inputs"""
    saw_tokens: bool
    """True if calibration tokens reached the layer; experts that no token reached are pruned by magnitude"""

    @property
    def kind(self) -> str:
        """Name without the expert's index."""
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """Return the name of a linear layer in a block without the expert's index."""
    return re.sub(r"\.\d+\.", ".", name)


def maps_to_prune(shape: SubNet, targets: Sequence[str], sparsity: Sparsity) -> list[list[str]]:
    """Return the names of the linear layers to prune in each block. Routers are never pruned.

    Args:
        shape: Shape of the model.
        targets: Parts of a block (`attn`, `mlp`) or kinds of linear layers (`attn.qkv`, `mlp.experts.proj`).
        sparsity: The sparsity of each linear layer.

    Raises:
        UserError: If a target matches no linear layer, no weight would become zero, or a layer's inputs cannot be
            divided into the pattern's groups.
    """
    layers = []
    for i in range(len(shape)):
        with torch.device("meta"):
            block = student_block(shape, i)
        layers.append({name: module for name, module in block.named_modules() if _is_prunable(name, module)})
    kinds = dict.fromkeys(kind_of(name) for maps in layers for name in maps)
    for target in targets:
        if not any(_matches(kind, target) for kind in kinds):
            raise UserError(f"targets must be attn, mlp or some of {', '.join(kinds)}, got {target!r}; change it")
    chosen = [
        {name: module for name, module in maps.items() if any(_matches(kind_of(name), target) for target in targets)}
        for maps in layers
    ]
    largest = max(module.weight.numel() for maps in chosen for module in maps.values())
    if round(sparsity.share * largest) == 0:
        raise UserError(
            f"sparsity must prune at least one weight, got {sparsity.share} of at most {largest:,}; raise it"
        )
    for i, maps in enumerate(chosen):
        for name, module in maps.items():
            if module.in_features % sparsity.group:
                raise UserError(
                    f"pattern {sparsity} needs a multiple of {sparsity.group} inputs, {name} of layer {i} has "
                    f"{module.in_features}; choose another pattern, or targets without this linear layer"
                )
    return [list(maps) for maps in chosen]


def _is_prunable(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not name.startswith("mlp.gate")


def _matches(kind: str, target: str) -> bool:
    return kind == target or kind.startswith(f"{target}.")


def refit(weight: torch.Tensor, pruned: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Refit the nonzero weights of a pruned linear layer to the unpruned layer's outputs, by least squares per output.

    Args:
        weight: The unpruned weight, shape (n_out, n_in).
        pruned: The pruned weight; its zeros are kept.
        moments: Moments of the inputs.
    """
    fitted = torch.zeros_like(pruned)
    products = weight.to(moments.zz.dtype) @ moments.zz  # Σ y xᵀ of the unpruned layer's outputs y
    for row, kept in enumerate(pruned != 0):
        if not kept.any():
            continue
        own = Moments(int(kept.sum()), 1, moments.zz.device)
        own.n, own.mass = moments.n, moments.mass
        own.zz, own.yz = moments.zz[kept][:, kept], products[row, None, kept]
        fitted[row, kept] = solve(own, weight[row, None, kept], REFIT_RIDGE, intercept=False).weight[0].to(fitted.dtype)
    return fitted


class Pruning:
    """Prunes a model's linear layers, one block at a time.

    Args:
        shape: Shape of the model.
        weights: The model's weights, without padding; memory-mapped weights are read a block at a time.
        maps: Names of the linear layers to prune in each block (`maps_to_prune`).
        pruner: The pruner.
        scratch: Folder of the hidden states and finished blocks, from which interrupted pruning resumes.
        windows: Token ids for calibration, shape (N, T); may be None if the pruner needs no data and `refit` is false.
        micro_batch_size: Windows per batch.
        refit: If true, refit the remaining weights of each linear layer in closed form.

    Raises:
        UserError: If activations are not finite.
    """

    def __init__(
        self,
        shape: SubNet,
        weights: Mapping[str, torch.Tensor],
        maps: Sequence[Sequence[str]],
        pruner: Pruner,
        scratch: Scratch,
        windows: torch.Tensor | None = None,
        micro_batch_size: int = 4,
        refit: bool = False,
    ) -> None:
        assert windows is not None or not (pruner.reads_data or refit), "nothing to calibrate on"
        self.shape, self.weights, self.maps, self.pruner = shape, weights, maps, pruner
        self.scratch, self.refit, self.device = scratch, refit, scratch.device
        self.windows = torch.zeros(0, 0, dtype=torch.long) if windows is None else windows
        n = len(self.windows)
        self.batches = [slice(start, min(start + micro_batch_size, n)) for start in range(0, n, micro_batch_size)]

    @exact_products()
    @torch.no_grad()
    def run(self, progress: bool = True) -> tuple[Weights, list[MapReport]]:
        """Prune all blocks.

        Returns:
            All weights, pruned or unchanged, and a report for each pruned linear layer.
        """
        finished = list(self._finished())
        if self.batches:
            self._begin_stream(len(finished))
        bar = tqdm(total=len(self.shape), desc="prune", unit="layer", disable=not progress, initial=len(finished))
        for i in range(len(finished), len(self.shape)):
            finished.append(self._prune_layer(i))
            self._finish(i, *finished[-1])
            bar.update()
        bar.close()
        weights = dict(self.weights)
        for pruned, _ in finished:
            weights |= pruned
        return weights, [report for _, reports in finished for report in reports]

    def _finish(self, i: int, weights: Weights, reports: list[MapReport]) -> None:
        """Save a finished block, so that interrupted pruning resumes after it."""
        if self.batches:
            self.stream.flush()
        rows = [dataclasses.asdict(report) for report in reports]
        self.scratch.save(f"layer-{i}", {"weights": weights, "reports": rows})
        self.scratch.remove_streams_before(i)

    def _finished(self) -> Iterator[tuple[Weights, list[MapReport]]]:
        """Yield the weights and reports of the blocks that an interrupted run has finished."""
        for i in range(len(self.shape)):
            if (saved := self.scratch.load(f"layer-{i}")) is None:
                return
            yield saved["weights"], [MapReport(**row) for row in saved["reports"]]

    def _open_stream(self, i: int) -> None:
        """Open the file of the hidden states before block i."""
        n, length = self.windows.shape
        self.stream = self.scratch.stream(f"stream-{i}", n, length, len(self.shape.n_embd))

    def _begin_stream(self, n_finished: int) -> None:
        """Open the hidden states before the first unfinished block; write the embeddings if it is block 0."""
        weights = read_outside(self.weights, self.device)
        outside = NonBlockModules(self.shape.config, weights, self.windows.shape[1], self.device)
        self.block_args = outside.block_args
        self._open_stream(n_finished)
        for batch in self.batches if n_finished == 0 else ():
            self.stream[batch] = outside.embed(self.windows[batch].to(self.device))

    # one layer --------------------------------------------------------------------------------------------------------

    def _prune_layer(self, i: int) -> tuple[Weights, list[MapReport]]:
        block = load_student_block(self.shape, i, read_block(self.weights, i, self.device))
        moments = self._moments(i, block)
        pruned, reports = {}, []
        for name in self.maps[i]:
            full_name, module = f"transformer.h.{i}.{name}.weight", block.get_submodule(name)
            weight, report = self._prune_map(module.weight, moments.get(name))
            pruned[full_name] = weight.to(self.weights[full_name].dtype).cpu()
            reports.append(MapReport(i, name, **report))
            # continue with the weights as saved, in a new tensor: the old weights may be memory-mapped
            module.weight = nn.Parameter(pruned[full_name].to(self.device, torch.float32), requires_grad=False)
        self._advance(i, block)
        return pruned, reports

    def _moments(self, i: int, block: Block) -> dict[str, Moments]:
        """Return the moments of each linear layer's inputs over all batches; layers with the same inputs share them."""
        found: dict[str, Moments] = {}
        for batch in self.batches:
            seen = run_block(block, self.stream[batch], self.block_args[i], self.maps[i])
            by_tensor: dict[int, Moments] = {}
            for name in self.maps[i]:
                x = seen[name]
                if id(x) not in by_tensor:
                    by_tensor[id(x)] = found.setdefault(name, Moments(x.shape[-1], 0, self.device, fp32_products=True))
                    by_tensor[id(x)].add(x, no_outputs(x))
                found[name] = by_tensor[id(x)]
        for name, moments in found.items():
            if not moments.zz.isfinite().all():
                raise UserError(
                    f"the input of {name} in layer {i} is not finite on calibration data; the checkpoint is "
                    "damaged, fetch it again"
                )
        return found

    def _prune_map(self, weight: torch.Tensor, moments: Moments | None) -> tuple[torch.Tensor, dict]:
        """Return a linear layer's pruned weight, and the fields of its report."""
        seen = moments if moments is not None and moments.n > 0 else None
        pruner = self.pruner
        if pruner.reads_data and seen is None:
            pruner = Magnitude(pruner.sparsity)
        pruned = pruner.prune(weight, moments)
        if self.refit and seen is not None:
            pruned = refit(weight, pruned, seen)
        error = None if seen is None else relative_error(weight, pruned, seen)
        n_zero = int((pruned == 0).sum())
        return pruned, {"n_zero": n_zero, "n_weights": weight.numel(), "error": error, "saw_tokens": seen is not None}

    def _advance(self, i: int, block: Block) -> None:
        """Run the hidden states through the pruned block."""
        if not self.batches:
            return
        before = self.stream
        self._open_stream(i + 1)
        for batch in self.batches:
            self.stream[batch] = block(before[batch], *self.block_args[i])


def relative_error(weight: torch.Tensor, pruned: torch.Tensor, moments: Moments) -> float:
    """Return ‖(W' − W) X‖² / ‖W X‖² for pruned weights W' and the moments of the inputs X."""
    w, off = (x.to(moments.zz.dtype) for x in (weight, pruned - weight))
    lost, all_of_it = (((x @ moments.zz) * x).sum() for x in (off, w))
    return float(lost / all_of_it.clamp_min(1e-30))
