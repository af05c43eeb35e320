"""Importance scores of a teacher's units, from activations on calibration tokens, weights and gradients.

There are three measures of channels, query groups, heads within groups, neurons and experts; higher is more important.
The activation of a head or neuron is its input to the output projection (outputs of heads, neurons after the gate). The
activation of an expert is its contribution to the residual stream. A channel's activations are the outputs of all norms
over channels.

- `activation`: L2 norm of the activation, averaged over the tokens of a sequence, then root of the sum of squares over
  sequences. Minitron (arXiv 2407.14679, section 2.2) found this aggregation best (batch = L2, sequence = mean).
  Channels are summed over the norms.
- `magnitude`: L2 norm of the weights (not the biases) that belong only to this unit.
- `taylor`: |gradient · activation|, the first-order change of a sequence's loss when the unit is set to zero (Molchanov
  et al., arXiv 1611.06440), in nats per token. Summed over tokens before the absolute value, averaged over sequences
  after it. Channels are summed over the norms.

There are two measures of layers:

- `block_influence`: one minus the cosine similarity of the residual stream before and after the layer, averaged over
  tokens (ShortGPT, arXiv 2403.03853).
- `perplexity`: the teacher's perplexity without the layer.

Attention and MLP of each layer are scored by their block influence alone.

Activations and gradients are collected by hooks on litgpt's own modules; the slicing rules map tensors to units.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from litgpt.config import Config
from litgpt.model import GPT, LLaMAMoE
from torch import nn
from tqdm import tqdm

from litgpt_whittle.batches import Batch
from litgpt_whittle.blocks import routing
from litgpt_whittle.distillation.head import head_loss, hidden_states
from litgpt_whittle.fitness.perplexity import Perplexity
from litgpt_whittle.index_plan import axes_of, units_of
from litgpt_whittle.ranking.influence import Influence
from litgpt_whittle.subnet import SubNet, layer_sizes
from litgpt_whittle.supergpt import SuperGPT
from litgpt_whittle.tensors import (
    IGNORE_INDEX,
    upcast,
)
from litgpt_whittle.unit_index import UnitIndex

METRICS = ("activation", "magnitude", "taylor")
LAYER_METRICS = ("block_influence", "perplexity")

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True, eq=False)
class UnitScores:
    """Scores of all units by one measure, float64 on the CPU."""

    n_embd: torch.Tensor
    """Terms of the channels' scores: a row per layer and a last row for other modules, shape (n_layer + 1, n_embd). The
    sum over rows is the score"""
    layers: tuple[dict[str, torch.Tensor], ...]
    """Per-layer units, by the names of a `SubNet`'s fields, each of shape (n_units,)"""

    @property
    def is_finite(self) -> bool:
        return all(bool(x.isfinite().all()) for x in (self.n_embd, *(x for own in self.layers for x in own.values())))


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of units and layers, by the names of the measures."""

    units: dict[str, UnitScores]
    layers: dict[str, torch.Tensor]
    """Each of shape (n_layer,)"""
    perplexity: float | None
    """Perplexity of the whole teacher, if the perplexity without each layer was measured"""
    sublayers: dict[str, torch.Tensor] = field(default_factory=dict)
    """Block influence of each layer's attention (`attn`) and MLP (`mlp`), of shape (n_layer,); empty if unknown"""


def measure(
    model: SuperGPT,
    windows: torch.Tensor,
    n_layer_windows: int,
    micro_batch_size: int = 4,
    autocast: Autocast = nullcontext,
    progress: bool = True,
    counts: torch.Tensor | None = None,
) -> Scores:
    """Score a teacher's units in one forward and backward pass, and its layers in one more forward pass per layer.

    Args:
        model: The teacher; `requires_grad` is set to false for its parameters.
        windows: Token ids, shape (N, T), with T at least 2.
        n_layer_windows: Number of windows for the perplexity without each layer; 0 omits that measure.
        micro_batch_size: Windows per batch. Units of models with experts are always scored with one window per batch,
            because routing loses track of the sequence that a token belongs to.
        autocast: Returns an autocast context, as `Fabric.autocast` does.
        progress: If true, show a progress bar.
        counts: True at positions whose next token counts in the loss and in perplexities, shape (N, T); by default all
            do.
    """
    model.requires_grad_(False)
    targets = F.pad(windows[:, 1:], (0, 1), value=IGNORE_INDEX)
    targets = targets if counts is None else targets.where(counts, IGNORE_INDEX)
    watch = _Watch(model, windows.shape[1])
    has_experts = any(isinstance(block.mlp, LLaMAMoE) for block in model.transformer.h)
    size, device = 1 if has_experts else micro_batch_size, model.lm_head.weight.device
    for ids, labels in tqdm(list(zip(windows.split(size), targets.split(size))), "units", disable=not progress):
        watch.run(ids.to(device), labels.to(device), autocast)
    units = {
        "activation": watch.scores(watch.activation, torch.sqrt),
        "magnitude": magnitudes(model),
        "taylor": watch.scores(watch.taylor, lambda total: total / len(windows)),
    }
    layers, perplexity = {"block_influence": watch.influence.layers / windows.numel()}, None
    sublayers = {part: total / windows.numel() for part, total in watch.influence.sublayers.items()}
    if n_layer_windows:
        parts = (part[:n_layer_windows, :-1].split(micro_batch_size) for part in (windows, targets))
        batches = [Batch(*batch) for batch in zip(*parts)]
        score = Perplexity(model, batches, autocast)
        perplexity = score(SubNet.full(model.config))["perplexity"]
        layers["perplexity"] = perplexities_without(model.config, score, progress)
    return Scores(units, layers, perplexity, sublayers)


def perplexities_without(teacher: Config, score: Perplexity, progress: bool = True) -> torch.Tensor:
    """Return the teacher's perplexity without each of its layers, shape (n_layer,); infinite if it has only one."""
    n_layer = teacher.n_layer
    found = torch.full((n_layer,), torch.inf, dtype=torch.float64)
    for layer in tqdm(range(n_layer if n_layer > 1 else 0), "layers", disable=not progress):
        others = UnitIndex([other for other in range(n_layer) if other != layer])
        found[layer] = score(SubNet(teacher, n_layer=others))["perplexity"]
    return found


@torch.no_grad()
def magnitudes(model: GPT) -> UnitScores:
    """Return, for each unit, the L2 norm of the weights that belong only to it; tied weights are counted once."""
    config = model.config
    channels = torch.zeros(config.n_layer + 1, config.n_embd, dtype=torch.float64)
    units = [units_of(config, layer) for layer in range(config.n_layer)]
    layers = [
        {name: torch.zeros(size, dtype=torch.float64) for name, size in layer_sizes(config, layer).items()}
        for layer in range(config.n_layer)
    ]
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        inside = re.match(r"transformer\.h\.(\d+)\.(.+)", name)
        layer, module = (int(inside[1]), inside[2]) if inside else (config.n_layer, name)
        module, squares = module.rpartition(".")[0], upcast(weight).square()
        for dim, axis in enumerate(axes_of(module)):
            sums = squares.sum(1 - dim).cpu().double()
            if axis == "n_embd":
                channels[layer] += sums
            for kind, own in units[layer].items() if inside else ():
                if axis in own:
                    layers[layer][kind] += sums[own[axis]].sum(-1)
        if module.startswith("mlp.experts."):
            layers[layer]["n_expert"][int(module.split(".")[2])] += float(squares.sum())
    return UnitScores(channels.sqrt(), tuple({name: total.sqrt() for name, total in own.items()} for own in layers))


Place = tuple[int, str]
"""Key of scores: a layer and a kind of units, or a layer and a norm over channels (`n_layer` for the final norm)"""


class _Watch:
    """Hooks that accumulate activations and gradients of units while a model runs on batches of sequences."""

    def __init__(self, model: GPT, n_tokens: int) -> None:
        self.model, self.n_tokens, self.n_layer = model, n_tokens, model.config.n_layer
        self.activation, self.taylor = _Sums(power=2), _Sums(power=1)
        self.influence = Influence(model)
        self.units = [units_of(model.config, layer) for layer in range(self.n_layer)]
        self.moe_inputs: dict[int, torch.Tensor] = {}

    def run(self, ids: torch.Tensor, targets: torch.Tensor, autocast: Autocast) -> None:
        """Add the sequences `ids` with next tokens `targets`, each of shape (B, T)."""
        self.n_sequences = len(ids)
        with self._watching(), torch.enable_grad():
            with autocast():
                head_input = hidden_states(self.model, ids)
                loss = head_loss(head_input, targets, softcap=self.model.config.final_logit_softcapping).loss
            # sum over tokens instead of the mean, because small gradients would underflow in fp16
            (loss * (targets != IGNORE_INDEX).sum()).backward()
        with torch.no_grad(), autocast():
            for layer, x in self.moe_inputs.items():
                size = partial(torch.linalg.vector_norm, dim=-1, keepdim=True)
                given = routing(self.model.transformer.h[layer].mlp, x, times=size)
                self.activation.add((layer, "n_expert"), self._per_sequence(upcast(given)) / self.n_tokens)
        self.moe_inputs.clear()
        self.activation.close()
        self.taylor.close()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        handles = [self.model.transformer.wte.register_forward_hook(lambda _, inputs, output: output.requires_grad_())]
        handles += [self._watch_output(self.model.transformer.ln_f, (self.n_layer, "ln_f"))]
        handles += self.influence.hooks()
        for layer, block in enumerate(self.model.transformer.h):
            for name, module in block.named_modules():
                handles += self._watch(layer, name, module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, layer: int, name: str, module: nn.Module) -> list:
        """Register hooks on a module of a block if it exposes units."""
        if isinstance(module, LLaMAMoE):
            note_input = lambda _, inputs: self.moe_inputs.update({layer: inputs[0].detach()})
            handles = [module.register_forward_pre_hook(note_input)]
            for j, expert in enumerate(module.experts):
                handles.append(expert.register_forward_hook(partial(self._note_expert, layer, j)))
            return handles
        if isinstance(module, nn.Identity) or next(module.children(), None) is not None:
            return []
        axes = axes_of(name)
        if axes == ("n_embd",):
            return [self._watch_output(module, (layer, name))]
        if axes[0] != "n_embd":
            return []
        own = {(layer, kind): units[axes[1]] for kind, units in self.units[layer].items() if axes[1] in units}
        return [module.register_forward_pre_hook(lambda _, inputs: self._note(inputs[0], own))]

    def _watch_output(self, norm: nn.Module, place: Place):
        channels = np.arange(self.model.config.n_embd)[:, None]
        return norm.register_forward_hook(lambda _, inputs, output: self._note(output, {place: channels}))

    def _note(self, x: torch.Tensor, own: dict[Place, np.ndarray]) -> None:
        """Add the activations of units, shape (…, n), with each unit's indices, shape (n_units, size)."""
        seen = x.detach()  # a hook that held x itself would keep it from being freed
        for place, indices in own.items():
            size = torch.linalg.vector_norm(_by_unit(upcast(seen), indices), dim=-1)
            self.activation.add(place, self._per_sequence(size) / self.n_tokens)
        x.register_hook(lambda gradient: self._note_gradient(upcast(gradient) * upcast(seen), own))

    def _note_gradient(self, product: torch.Tensor, own: dict[Place, np.ndarray]) -> None:
        for place, indices in own.items():
            change = self._per_sequence(_by_unit(product, indices).sum(-1))
            self.taylor.add(place, change / (self.n_tokens - 1))

    def _note_expert(self, layer: int, j: int, expert: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        seen = output.detach()

        def note(gradient: torch.Tensor) -> None:
            changes = torch.zeros(1, self.model.config.n_expert, dtype=torch.float64)
            changes[0, j] = float((upcast(gradient) * upcast(seen)).sum()) / (self.n_tokens - 1)
            self.taylor.add((layer, "n_expert"), changes)

        output.register_hook(note)

    def _per_sequence(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the tokens of each sequence, which are contiguous: (…, n_units) to (B, n_units)."""
        rows = values.flatten(0, -2)
        return rows.view(self.n_sequences, len(rows) // self.n_sequences, rows.shape[-1]).sum(1)

    def scores(self, sums: _Sums, of: Callable[[torch.Tensor], torch.Tensor]) -> UnitScores:
        """Convert the sums to scores by the function `of`."""
        channels = torch.zeros(self.n_layer + 1, self.model.config.n_embd, dtype=torch.float64)
        for (layer, name), total in sums.total.items():
            if layer == self.n_layer or name not in self.units[layer]:
                channels[layer] += of(total)
        layers = ({kind: of(sums.total[i, kind]) for kind in units} for i, units in enumerate(self.units))
        return UnitScores(channels, tuple(layers))


def _by_unit(x: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
    """Gather each unit's elements: (…, n) to (…, n_units, size)."""
    return x.unsqueeze(-1) if indices.shape[1] == 1 else x[..., torch.from_numpy(indices).to(x.device)]


class _Sums:
    """Sums over sequences of |x|^power, where x is the total of a sequence."""

    def __init__(self, power: int) -> None:
        self.power = power
        self.total: dict[Place, torch.Tensor] = {}
        self._open: dict[Place, torch.Tensor] = {}

    def add(self, place: Place, values: torch.Tensor) -> None:
        """Add values to the totals of this batch's sequences, shape (B, n_units)."""
        self._open[place] = self._open[place] + values if place in self._open else values

    def close(self) -> None:
        """Finish the batch and add its totals to the sums."""
        for place, values in self._open.items():
            power = values.cpu().double().abs().pow(self.power).sum(0)
            self.total[place] = self.total[place] + power if place in self.total else power
        self._open.clear()
