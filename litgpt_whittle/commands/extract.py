"""`litgpt extract`: extract a sub-network from its teacher and save it as a checkpoint that stock litgpt loads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.batches import BatchArgs, held_out_windows, read_calibration, sequence_length
from litgpt_whittle.batches import fingerprint as batches_fingerprint
from litgpt_whittle.calibration import Calibration, check_n_windows, n_held_out
from litgpt_whittle.checkpoint import (
    WEIGHTS,
    check_checkpoint,
    has_tokenizer,
    read_weights,
    save_checkpoint,
    weights_fingerprint,
)
from litgpt_whittle.command_config import CommandConfig, as_command
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.data.loading import check_data
from litgpt_whittle.errors import UserError
from litgpt_whittle.families import check_expressible
from litgpt_whittle.figures.curves import plot_repair
from litgpt_whittle.files import check_out_dir, check_space, readable_size
from litgpt_whittle.hf.padded import fit_heads
from litgpt_whittle.hints import try_next
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.manifest import digest
from litgpt_whittle.processes import launch, lock_output, n_devices, rank, release_memory, shutdown
from litgpt_whittle.registry import version
from litgpt_whittle.repair.args import LEAST_TOKENS, RepairArgs
from litgpt_whittle.repair.costs import scratch_bytes
from litgpt_whittle.repair.repaired import Repaired
from litgpt_whittle.repair.sequential import SequentialRepair
from litgpt_whittle.results import Checkpoint, Checkpoints, searched_perplexity
from litgpt_whittle.scratch import Scratch, scratch_beside
from litgpt_whittle.setting_checks import check_seed
from litgpt_whittle.subnet import SubNet, fingerprint, read_choice
from litgpt_whittle.supergpt import Weights, extract_weights, is_tied
from litgpt_whittle.training.model_source import BASIS

logger = logging.getLogger(__name__)

NARROW = 1.5
"""A note is printed if the KL divergence on held-out tokens is more than this many times that on fitted tokens"""


@dataclass
class ExtractConfig(CommandConfig):
    """Extract a sub-network from a checkpoint."""

    # the teacher's weights and the sub-network are compared instead of their paths
    FREE: ClassVar[frozenset[str]] = frozenset(("out_dir", "overwrite", "devices", "data.init_args.num_workers"))
    RESOLVED: ClassVar[frozenset[str]] = frozenset(("checkpoint_dir", "sub_network"))

    checkpoint_dir: Path
    """The teacher's checkpoint directory."""
    sub_network: Path
    """YAML of the kept units, such as ``best.yaml`` of ``litgpt search``; or the folder of a search, to extract the
    best sub-network of each bin."""
    out_dir: Path = Path("out/extract")
    """Directory of the student's checkpoint; for a search folder, it gets one subdirectory per student."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Data type of the stored weights; by default the teacher's."""
    overwrite: bool = False
    """Replace the checkpoint in ``out_dir``."""
    repair: bool | RepairArgs = False
    """Fit the remaining weights in closed form, so that they compensate for the removed units: ``true``, or settings
    such as ``--repair.refine_passes 1``."""
    data: DataModule | None = None
    """Calibration data of the repair: the training split of any litgpt data module, or
    ``--data HFText --data.path PATH``."""
    train: BatchArgs = field(default_factory=BatchArgs)
    """Micro batch size and sequence length for the repair."""
    devices: int | str = 1
    """Devices that share a repair's calibration tokens: GPUs, or processes on a CPU's cores."""
    seed: int = 42
    """Seed of the data order."""

    def __post_init__(self) -> None:
        self.checkpoint_dir = extend_checkpoint_dir(Path(self.checkpoint_dir))
        self.sub_network, self.out_dir = Path(self.sub_network), Path(self.out_dir)

    def validate(self) -> None:
        """Check all arguments except the sub-network, whose file may not exist yet.

        Raises:
            UserError: For the first invalid argument.
        """
        check_seed(self.seed)
        n = n_devices(self.devices)
        if n > 1 and not self.repair:
            raise UserError(f"only a repair can use several devices, got devices = {n} without it; add --repair true")
        teacher = check_checkpoint(self.checkpoint_dir)
        if self.repair:
            if self.data is None:
                raise UserError("a repair needs data to calibrate on; for example --data HFText --data.path PATH")
            check_n_windows(-(-(self.repair_args.tokens or LEAST_TOKENS) // self.length))
            check_data(self.data, self.checkpoint_dir, teacher.padded_vocab_size)

    @property
    def repair_args(self) -> RepairArgs:
        """Settings of the repair."""
        return self.repair if isinstance(self.repair, RepairArgs) else RepairArgs()

    @property
    def length(self) -> int:
        """Tokens per calibration sample."""
        return sequence_length(check_checkpoint(self.checkpoint_dir), self.train.max_seq_length)

    @property
    def key(self) -> str:
        """A fingerprint of all that determines the student: teacher weights, sub-network and settings."""
        inputs = {"weights": weights_fingerprint(self.checkpoint_dir), "sub_network": self.sub_network.read_text()}
        settings = self.determining_arguments()
        if not self.repair:  # only a repair reads data
            settings = {name: value for name, value in settings.items() if name.split(".")[0] not in ("data", "train")}
        return digest(inputs | settings)

    def is_finished(self) -> bool:
        """Return whether `out_dir` already holds this student."""
        path = self.out_dir / "sub_network.yaml"
        return path.is_file() and (read_choice(path).get("provenance") or {}).get("key") == self.key

    def run(self) -> Checkpoint | Checkpoints | None:
        """Extract the student, or the students of a search's folder.

        Returns:
            The student's checkpoint, or the checkpoints of all students of a search's folder; None on all processes but
            the first.

        Raises:
            UserError: For the first invalid argument, before anything expensive starts.
        """
        with lock_output(self.out_dir):
            return self._extract_all() if self.sub_network.is_dir() else self._extract()

    def _extract_all(self) -> Checkpoints:
        check_checkpoint(self.checkpoint_dir)
        paths = _best_of_search(self.sub_network)
        if n_devices(self.devices) > 1:
            raise UserError(
                f"several students can only be extracted on one device, got devices = {self.devices}; use --devices 1"
            )
        students = [replace(self, sub_network=path, out_dir=self.out_dir / path.stem) for path in paths]
        finished = [not self.overwrite and student.is_finished() for student in students]
        for student, is_finished in zip(students, finished):
            if not is_finished:
                student.check_out_dir()
        checkpoints = []
        for student, is_finished in zip(students, finished):
            if is_finished:
                logger.info(f"{student.out_dir} is finished already.")
                checkpoints.append(Checkpoint(student.out_dir))
                continue
            extracted = student.run()
            assert isinstance(extracted, Checkpoint)  # one device has extracted it
            logger.info(extracted.summary)  # now, in case that the next one fails
            checkpoints.append(extracted)
            release_memory()  # the next repair measures free memory
        return Checkpoints(self.out_dir, checkpoints, summary=_students_table([each.folder for each in checkpoints]))

    def check_out_dir(self) -> None:
        """Raise UserError if `out_dir` cannot be written, or would overwrite the inputs or another checkpoint."""
        check_out_dir(self.out_dir, self.overwrite, (self.checkpoint_dir, self.sub_network), WEIGHTS)

    def _extract(self) -> Checkpoint | None:
        self.validate()
        teacher = check_checkpoint(self.checkpoint_dir)
        subnet = SubNet.load(self.sub_network, teacher)
        self.check_out_dir()
        weights = read_weights(self.checkpoint_dir)
        # computed first, because connecting the data module may change its settings
        counts: dict[str, Any] = {"key": self.key, **_counts(subnet, is_tied(weights))}
        stored = self._stored_dtype(weights)
        n_stored = max(counts["n_params"], counts.get("n_params_padded", 0))
        check_space(self.out_dir, n_stored * stored.itemsize, "the student")
        if self.repair and subnet != SubNet.full(teacher):
            return self._repair(weights, subnet, counts)
        if self.repair:
            logger.info("The sub-network is the whole teacher, so there is nothing to repair.")
        student = extract_weights(weights, subnet, is_tied(weights))
        if self.dtype:
            _convert(student, stored)
        return self._save(subnet, student, counts)

    def _stored_dtype(self, weights: Weights) -> torch.dtype:
        return getattr(torch, self.dtype) if self.dtype else weights["lm_head.weight"].dtype

    def _repair(self, weights: Weights, subnet: SubNet, counts: dict[str, Any]) -> Checkpoint | None:
        args = self.repair_args
        calibration, n_tokens = self._read_calibration(subnet)
        scratch = _open_scratch(self.checkpoint_dir, subnet, calibration, args, self.out_dir)
        try:
            repaired = SequentialRepair(weights, subnet, calibration, args, scratch).run(progress=rank() == 0)
        except UserError:  # the same command could not resume from this scratch folder
            scratch.remove()
            raise
        if not shutdown():
            return None  # every process has the whole student; the first one saves it
        described = asdict(args) | {"basis": repaired.basis_name, "tokens": n_tokens, "seed": self.seed}
        _convert(repaired.weights, self._stored_dtype(weights))
        saved = self._save(repaired.subnet, repaired.weights, counts | {"repair": described}, repaired.basis)
        plot_repair(repaired.layers, self.out_dir / "repair.png")
        scratch.remove()
        return replace(saved, summary=f"{saved.summary}\n{_repair_summary(repaired, calibration)}")

    def _read_calibration(self, subnet: SubNet) -> tuple[Calibration, int]:
        """Launch the processes, and return the calibration data and its number of tokens, without validation tokens."""
        assert self.data is not None, "validate has checked it"
        args, length, size = self.repair_args, self.length, self.train.micro_batch_size
        fabric = launch(n_devices(self.devices))
        n_tokens = args.n_tokens(subnet.config)
        logger.info(f"Calibrating on {n_tokens:,} tokens (--repair.tokens)")
        windows = read_calibration(self.data, self.checkpoint_dir, size, length, n_tokens, self.seed, "repair.tokens")
        n_closed_form = -(-args.n_closed_form(subnet.config) // length)
        held_out = held_out_windows(self.data, length, windows.input_ids.shape[1], n_held_out(*windows.input_ids.shape))
        ids, counts = (None, None) if held_out is None else (held_out.input_ids, held_out.counts)
        found = Calibration(windows.input_ids, size, fabric.device, n_closed_form, ids, windows.counts, counts)
        return found, windows.input_ids.numel()

    def _save(
        self, subnet: SubNet, student: Weights, counts: dict[str, Any], basis: torch.Tensor | None = None
    ) -> Checkpoint:
        """Write the student with its provenance."""
        origin = (read_choice(self.sub_network).get("provenance") or {}) | {
            "teacher": subnet.teacher.name,
            "teacher_config": fingerprint(subnet.teacher),
            "checkpoint_dir": str(self.checkpoint_dir.absolute()),
            **counts,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "litgpt_whittle": version(),
        }
        choice = subnet.to_dict() | {"provenance": origin}
        extra = None if basis is None else {BASIS: {"basis": basis}}
        save_checkpoint(self.out_dir.resolve(), subnet, student, self.checkpoint_dir, choice, extra)
        if why := _why_not_convertible(subnet):
            logger.info(
                f"Note: litgpt evaluate, convert_from_litgpt and export cannot convert it for transformers: {why}"
            )
        if not has_tokenizer(self.out_dir):
            logger.info(
                f"Note: {self.checkpoint_dir} has no tokenizer, so neither has {self.out_dir}; `litgpt generate` "
                "needs one."
            )
        return Checkpoint(self.out_dir, summary=_summary(subnet, counts, self.sub_network, self.out_dir))


setup = as_command(ExtractConfig)


def _why_not_convertible(subnet: SubNet) -> str | None:
    """Return the reason why transformers cannot represent the saved student; None if it can."""
    try:
        fit_heads(subnet.config, check_expressible(subnet.config))
    except UserError as error:
        return str(error)
    return None


def _best_of_search(folder: Path) -> list[Path]:
    """Return the files of the best sub-networks in a search's folder."""
    found = sorted(path for path in folder.glob("best*.yaml") if not path.stem.endswith("-by-score"))
    if not found:
        raise UserError(
            f"{str(folder)!r} has no best*.yaml of a search; name a sub-network's YAML or a search's folder"
        )
    return found


def _students_table(folders: Sequence[Path]) -> str:
    """Return a table of a search's students, with the perplexities that the search measured."""
    lines = [f"{'student':<40}{'parameters':>14}{'perplexity as searched':>25}{'bits per byte':>15}"]
    for folder in folders:
        origin = read_choice(folder / "sub_network.yaml")["provenance"]
        searched = searched_perplexity(origin)
        measured = "not measured" if searched is None else f"{searched:.2f}"
        bits = f"{origin['bits_per_byte']:.4f}" if "bits_per_byte" in origin else ""
        lines.append(f"{folder!s:<40}{origin['n_params']:>14,}{measured:>25}{bits:>15}".rstrip())
    return "\n".join(lines)


def _counts(subnet: SubNet, tied: bool) -> dict[str, int]:
    """Count the parameters of student, teacher and, if layers differ, the padded form that stock litgpt loads."""
    counts = {
        "n_params": n_params(subnet.teacher, subnet, tied),
        "n_params_teacher": n_params(subnet.teacher, SubNet.full(subnet.teacher), tied),
    }
    if not subnet.is_uniform:
        counts["n_params_padded"] = n_params(subnet.config, SubNet.full(subnet.config), tied)
    return counts


def _open_scratch(
    checkpoint_dir: Path, subnet: SubNet, calibration: Calibration, args: RepairArgs, out_dir: Path
) -> Scratch:
    """Open the repair's scratch folder next to `out_dir`, new or from an interrupted repair."""
    windows, counts = calibration.windows, calibration.counts(slice(None))
    inputs = {
        "weights": weights_fingerprint(checkpoint_dir),
        "teacher": fingerprint(subnet.teacher),
        "sub_network": subnet.to_dict(),
        "repair": asdict(args),
        "counts": None if counts is None else batches_fingerprint([(counts,)]),
    }
    scratch = scratch_beside(out_dir, "repair", windows, inputs)
    needed = scratch_bytes(subnet, windows.numel(), args.refine_passes > 0) - scratch.size
    try:
        check_space(out_dir, needed, "the repair's scratch files")
    except UserError:
        if scratch.is_new:  # nothing to resume from
            scratch.remove()
        raise
    return scratch


def _repair_summary(repaired: Repaired, calibration: Calibration) -> str:
    layers = repaired.layers
    before = sum(layer.before for layer in layers) / len(layers)
    lines = [
        "Repaired. Error of the student's hidden states, squared and relative to the teacher's at each token:",
        f"  {layers[-1].after:.1%} after the last block; an unrepaired block would add up to {before:.1%} on average.",
    ]
    steps = {"the head was fitted to them": repaired.head, "all blocks were trained together": repaired.refined}
    if tried := {name: errors for name, errors in steps.items() if errors is not None}:
        before, after = next(iter(tried.values())).before, list(tried.values())[-1].after
        described = ", then ".join(f"{errors.after:.3f} when {name}" for name, errors in tried.items())
        n = len(calibration.counted(calibration.held_out_windows))
        source = "validation" if calibration.is_validated else "held-out calibration"
        lines += [
            f"  Its predictions are {after:.3f} nats per token from the teacher's (KL on {n:,} {source} tokens:",
            f"  {before:.3f} after the blocks' closed form, {described}).",
        ]
        if repaired.fitted is not None and after > NARROW * repaired.fitted:
            lines.append(
                f"  Note: on calibration tokens it is only {repaired.fitted:.3f}; raise --repair.tokens, or calibrate "
                "on broader text."
            )
    if left := sorted({name for layer in layers for name in layer.left_as_cut}):
        lines.append(f"  Not fitted in closed form: {', '.join(left)}.")
    return "\n".join(lines)


def _convert(weights: Weights, dtype: torch.dtype) -> None:
    """Convert in place, one tensor at a time, so that memory never holds two students; tied weights stay tied."""
    done: dict[int, torch.Tensor] = {}
    for name in list(weights):
        tensor = weights[name]
        if tensor.data_ptr() not in done:
            done[tensor.data_ptr()] = tensor.to(dtype)
        weights[name] = done[tensor.data_ptr()]


def _summary(subnet: SubNet, counts: dict[str, int], sub_network: Path, out_dir: Path) -> str:
    """Return a readable summary of the extraction."""
    before, after = counts["n_params_teacher"], counts["n_params"]
    layers = "" if subnet.n_layer.is_prefix else f" (the teacher's {subnet.n_layer})"
    lines = [
        f"Cut {sub_network} out of {subnet.teacher.name}:",
        f"  parameters  {before:,} -> {after:,} ({after / before:.1%})",
        f"  layers      {subnet.teacher.n_layer} -> {len(subnet)}{layers}",
    ]
    lines += [f"  {name:<11} {of} -> {kept}" for name, of, kept in _sizes(subnet)]
    if not subnet.is_uniform:
        lines += [
            f"{_why_padded(subnet)} Stock litgpt",
            f"opens it with the same outputs: {WEIGHTS} is padded with zeros to {counts['n_params_padded']:,}",
            f"parameters. litgpt_whittle.load_model opens its {after:,}.",
        ]
    weights = out_dir / WEIGHTS
    hint = try_next("generate", out_dir)
    return "\n".join([*lines, f"Saved {weights} ({readable_size(weights.stat().st_size)}). {hint}"])


def _why_padded(subnet: SubNet) -> str:
    if subnet.drops_sublayers:
        return "Some of its layers lack attention or MLP."
    if subnet.layers_are_alike:
        return "Its heads do not fill its channels, which transformers needs."
    return "Its layers differ in width."


def _sizes(subnet: SubNet) -> list[tuple[str, Any, str]]:
    """Return name, teacher's size and kept size of every dimension that shrank."""
    teacher = subnet.teacher
    keeps = [subnet.layer(i) for i in range(len(subnet))]
    attentions = [keep.sizes[:2] for keep in keeps if "attn" in keep.parts]
    mlps = [keep.sizes[2:] for keep in keeps if "mlp" in keep.parts]
    width = teacher.moe_intermediate_size or teacher.intermediate_size
    rows = [
        ("attentions", len(keeps), [len(attentions)]),
        ("MLPs", len(keeps), [len(mlps)]),
        ("channels", teacher.n_embd, [len(subnet.n_embd)]),
        ("heads", teacher.n_head, [groups * per_group for groups, per_group in attentions]),
        ("head size", teacher.head_size, [len(subnet.head_size)]),
        ("neurons", teacher.intermediate_size, [neurons for neurons, n_expert in mlps if not n_expert]),
        ("experts", teacher.n_expert, [n_expert for _, n_expert in mlps if n_expert]),
        ("per expert", width, [neurons for neurons, n_expert in mlps if n_expert]),
    ]
    if teacher.n_query_groups != teacher.n_head:
        rows.insert(4, ("groups", teacher.n_query_groups, [groups for groups, _ in attentions]))
    return [(name, of, _span(kept)) for name, of, kept in rows if kept and set(kept) != {of}]


def _span(sizes: list[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
