"""Compare the device's results with the CPU's for small models of many families, for everything that computes."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Bench
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import save_config

from litgpt_whittle import SubNet, extract_weights, load_model, student_model
from litgpt_whittle.batches import Batch
from litgpt_whittle.calibration import Calibration
from litgpt_whittle.checkpoint import read_weights
from litgpt_whittle.contrib.prune import SparseGPT, Sparsity
from litgpt_whittle.contrib.prune.pruning import Pruning, maps_to_prune
from litgpt_whittle.distillation.args import HiddenArgs
from litgpt_whittle.distillation.head import LossModel
from litgpt_whittle.distillation.hidden import HiddenLoss
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.fitness.kl import KLDivergence
from litgpt_whittle.fitness.perplexity import Perplexity, RepairedPerplexity
from litgpt_whittle.least_squares import exact_products
from litgpt_whittle.ranking.scores import measure
from litgpt_whittle.repair.args import RepairArgs
from litgpt_whittle.repair.sequential import SequentialRepair
from litgpt_whittle.scratch import Scratch
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.supergpt import SuperGPT
from litgpt_whittle.supernet import SuperLossModel
from litgpt_whittle.training.teacher import LiveTeacher

FAMILIES = (
    "pythia-14m",
    "Llama-3.2-1B",
    "Gemma-3-1b-it",
    "Gemma-2-2b",
    "Qwen3-0.6B",
    "OLMo-2-1124-7B",
    "phi-2",
    "Qwen3-30B-A3B",
    "stablelm-base-alpha-3b",
    "falcon-7b",
)
"""Models of litgpt's table, shrunk to tiny sizes; the most different ones first"""

LENGTH = 16


def small(name: str) -> Config:
    """Return the config of a litgpt model of the same kind with tiny sizes."""
    full = Config.from_name(name)
    n_layer = 8 if full.rope_local_base_freq else 4  # Gemma 3 attends globally in every sixth layer
    changes: dict[str, Any] = {"n_layer": n_layer, "n_embd": 32, "n_head": 4, "head_size": 16, "intermediate_size": 24}
    changes |= {"block_size": 24, "vocab_size": 61, "padding_multiple": 8, "padded_vocab_size": 64}
    changes["n_query_groups"] = {full.n_head: 4, 1: 1}.get(full.n_query_groups, 2)
    if full.moe_intermediate_size is not None:
        changes["moe_intermediate_size"] = 20
    if full.n_expert:
        changes |= {"n_expert": 4, "n_expert_per_token": 2}
    if full.sliding_window_size is not None:
        changes |= {"sliding_window_size": 5, "sliding_window_indices": full.sliding_window_indices[:n_layer]}
    if full.rope_indices is not None:
        changes["rope_indices"] = full.rope_indices[:n_layer]
    if full.attention_scores_scalar is not None:
        changes["attention_scores_scalar"] = 16
    return Config.from_name(name, **changes)


@dataclass
class Case:
    """A family's teacher with random weights, one of its sub-networks, and tokens; all results on one device."""

    config: Config
    folder: Path
    """Checkpoint of the teacher"""
    device: torch.device
    scratch: Path
    subnet: SubNet = field(init=False)
    ids: torch.Tensor = field(init=False)  # (12, T)

    def __post_init__(self) -> None:
        self.subnet = Space(self.config, "fine_layerwise").sample(np.random.default_rng(0))
        self.ids = torch.randint(60, (12, LENGTH), generator=torch.Generator().manual_seed(0))

    def teacher(self, dtype: torch.dtype = torch.float32) -> SuperGPT:
        """Return the teacher on the device."""
        model = load_model(self.folder, "SuperGPT", dtype, self.device)
        model.max_seq_length = LENGTH
        return model

    def student(self) -> GPT:
        """Return the sub-network as a standalone model, on the device."""
        model = student_model(self.subnet)
        model.load_state_dict(extract_weights(read_weights(self.folder), self.subnet))
        model.max_seq_length = LENGTH
        return model.to(self.device)

    @property
    def batches(self) -> list[Batch]:
        """Two batches, on the CPU."""
        return [Batch(rows[:, :-1], rows[:, 1:]) for rows in self.ids[:4].split(2)]

    def new_scratch(self, name: str) -> Scratch:
        """Return an empty folder for streams."""
        return Scratch(self.scratch / f"{self.folder.name}-{name}-{self.device.type}", str(self.device))


Result = Callable[[Case], Any]
"""Function that computes tensors or numbers on the case's device"""


@torch.no_grad()
def whole_logits(case: Case) -> Any:
    """Return the teacher's logits."""
    return case.teacher()(case.ids.to(case.device))


@torch.no_grad()
def logits_inside(case: Case) -> Any:
    """Return the sub-network's logits inside its teacher."""
    model = case.teacher()
    with model.running(case.subnet):
        return model(case.ids.to(case.device))


@torch.no_grad()
def logits_extracted(case: Case) -> Any:
    """Return the logits of the sub-network as a standalone model."""
    return case.student().eval()(case.ids.to(case.device))


def scored(measure: type, **wanted: str) -> Result:
    """Return a function that scores the sub-network by a fitness; `wanted` names attributes of the case to pass."""

    def run(case: Case) -> Any:
        more = {name: getattr(case, attribute) for name, attribute in wanted.items()}
        return list(measure(case.teacher(), case.batches, **more)(case.subnet).values())

    return run


def repair_errors(case: Case) -> Any:
    """Return each layer's error after a repair."""
    calibration = Calibration(case.ids, 4, case.device)
    args = RepairArgs(tokens=case.ids.numel())
    repair = SequentialRepair(read_weights(case.folder), case.subnet, calibration, args, case.new_scratch("repair"))
    return [layer.after for layer in repair.run(progress=False).layers]


def importance(case: Case) -> Any:
    """Return the channels' first-order importance, and the layers' influence."""
    found = measure(case.teacher(), case.ids, 4, 2, progress=False)
    return [found.units["taylor"].n_embd.flatten(), found.layers["block_influence"].flatten()]


def pruning_errors(case: Case) -> Any:
    """Return the errors of the linear layers after SparseGPT."""
    full, pruner = SubNet.full(case.config), SparseGPT(Sparsity.parse(0.5, None))
    maps = maps_to_prune(full, ["attn", "mlp"], pruner.sparsity)
    scratch = case.new_scratch("prune")
    scratch.device = case.device
    pruning = Pruning(full, read_weights(case.folder), maps, pruner, scratch, case.ids, 4)
    return [report.error for report in pruning.run(progress=False)[1]]


def distillation_losses(case: Case, dtype: torch.dtype = torch.float32, is_compiled: bool = False) -> Any:
    """Return the losses of two optimizer steps, hidden states included.

    Args:
        case: The models.
        dtype: The teacher's type, and the student's under autocast.
        is_compiled: If true, compile the student.
    """
    student = case.student()
    match = HiddenLoss(student, case.config, HiddenArgs(weight=0.5), case.subnet)
    root = LossModel(student, match).to(case.device)
    root.objective = Objective(0.2, 0.8, 0.9)
    run = torch.compile(root) if is_compiled else root
    teacher = LiveTeacher(case.folder, LENGTH, dtype, case.device)
    teacher.watch(match.pairs.values())
    optimizer, losses = torch.optim.AdamW(root.parameters(), lr=1e-3), []
    ids = case.ids[:4].to(case.device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for _ in range(2):
        with torch.autocast(case.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = run(x, y, teacher(x)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(root.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def supernet_losses(case: Case) -> Any:
    """Return the losses of the whole super-network and of a sub-network, and the norm of their summed gradients."""
    model = case.teacher().requires_grad_(True)
    root, losses = SuperLossModel(model), []
    ids = case.ids[:4].to(case.device)
    for subnet in (SubNet.full(case.config), case.subnet):
        with model.running(subnet, trains=True):
            loss = root(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).loss
            loss.backward()
        losses.append(loss.item())
    squares = [weight.grad.double().square().sum() for weight in model.parameters()]
    return [*losses, torch.stack(squares).sum().sqrt().item()]


RESULTS: dict[str, Result] = {
    "whole_logits": whole_logits,
    "logits_inside": logits_inside,
    "logits_extracted": logits_extracted,
    "perplexity": scored(Perplexity),
    "kl": scored(KLDivergence),
    "repaired_perplexity": scored(RepairedPerplexity, calibration="ids"),
    "repair_errors": repair_errors,
    "importance": importance,
    "pruning_errors": pruning_errors,
    "distillation_losses": distillation_losses,
    "supernet_losses": supernet_losses,
}
"""By name, as in `goals.TOLERANCES`"""


def difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference of two results, relative to the largest value."""
    a, b = _flat(ours), _flat(theirs)
    assert a.shape == b.shape, f"{tuple(a.shape)} values on the device, {tuple(b.shape)} on the CPU"
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))


def _flat(result: Any) -> torch.Tensor:
    parts = result if isinstance(result, list) else [result]
    return torch.cat([torch.as_tensor(part).detach().double().cpu().flatten() for part in parts])


def cases(name: str, folder: Path, device: torch.device) -> tuple[Case, Case]:
    """Return a family's case on the device and on the CPU; the checkpoint is written first."""
    config, checkpoint = small(name), folder / name
    torch.manual_seed(0)
    model = GPT(config)
    for key, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in key else 0.0, 0.1)
    checkpoint.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), checkpoint / "lit_model.pth")
    save_config(config, checkpoint)
    on_device = Case(config, checkpoint, torch.device(device), folder)
    return on_device, dataclasses.replace(on_device, device=torch.device("cpu"), scratch=folder / "cpu")


def values(bench: Bench) -> Iterator[dict]:
    """Compare all results of each family, and yield the largest difference of each; failures do not stop the others."""
    worst: dict[str, float] = {}
    failures: dict[str, list[str]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, exact_products():
        for name in FAMILIES[: bench.size(None, 2)]:
            ours, theirs = cases(name, Path(folder), bench.device)
            for result, run in RESULTS.items():
                try:
                    worst[result] = max(worst.get(result, 0.0), difference(run(ours), run(theirs)))
                except Exception as error:
                    failures[result].append(f"{name}: {type(error).__name__}: {str(error)[:160]}")
            yield {"families": FAMILIES.index(name) + 1, **worst, "failures": dict(failures)}
    if failures:
        example = next(iter(failures.values()))[0]
        raise RuntimeError(f"{', '.join(failures)} could not be computed, for instance {example}")
