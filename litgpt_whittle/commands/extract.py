"""`litgpt extract`: cut a sub-network out of its teacher and save it as a checkpoint that stock litgpt opens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from litgpt.data import DataModule
from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.batches import BatchArgs, check_seed, held_out_windows, read_calibration, sequence_length
from litgpt_whittle.calibration import Calibration, check_n_windows, n_held_out
from litgpt_whittle.checkpoint import (
    WEIGHTS,
    check_checkpoint,
    has_tokenizer,
    read_weights,
    save_checkpoint,
    weights_fingerprint,
)
from litgpt_whittle.data.hf_text import HFText  # noqa: F401 (lets --data HFText be found by its name)
from litgpt_whittle.data.loading import check_data
from litgpt_whittle.errors import UserError
from litgpt_whittle.families import check_expressible
from litgpt_whittle.figures.curves import plot_repair
from litgpt_whittle.files import check_out_dir, check_space, readable_size
from litgpt_whittle.hf.export import fit_heads
from litgpt_whittle.hints import try_next
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.processes import launch, locks_output, n_devices, rank, release_memory, shutdown
from litgpt_whittle.registry import version
from litgpt_whittle.repair.args import LEAST_TOKENS, RepairArgs
from litgpt_whittle.repair.costs import scratch_bytes
from litgpt_whittle.repair.repaired import Repaired
from litgpt_whittle.repair.sequential import SequentialRepair
from litgpt_whittle.results import searched_perplexity
from litgpt_whittle.scratch import Scratch, scratch_beside
from litgpt_whittle.settings import describe
from litgpt_whittle.subnet import SubNet, fingerprint, read_choice
from litgpt_whittle.supergpt import Weights, extract_weights, is_tied
from litgpt_whittle.training.model_source import BASIS

NARROW = 1.5
"""Ratio of the divergences on validation and on calibration tokens from which a note asks for more or broader text"""


@locks_output
def setup(
    checkpoint_dir: Path,
    sub_network: Path,
    out_dir: Path = Path("out/extract"),
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    overwrite: bool = False,
    repair: bool | RepairArgs = False,
    data: DataModule | None = None,
    train: BatchArgs = BatchArgs(),
    devices: int | str = 1,
    seed: int = 42,
) -> None:
    """Cut a sub-network out of a checkpoint.

    Arguments:
        checkpoint_dir: The teacher's checkpoint directory.
        sub_network: YAML of the kept units, such as ``best.yaml`` of ``litgpt search``; or the folder of a search, to
            extract the best sub-network of each bin.
        out_dir: Directory of the student's checkpoint; for a search folder, each student goes to a folder in it.
        dtype: Data type of the stored weights; by default the teacher's.
        overwrite: Replace the checkpoint in ``out_dir``.
        repair: Fit the remaining weights in closed form, so that they compensate for the removed units: ``true``, or
            settings such as ``--repair.refine_passes 1``.
        data: Calibration data of the repair: the training split of any litgpt data module, or
            ``--data HFText --data.path PATH``.
        train: Micro batch size and sequence length for the repair.
        devices: Devices that share a repair's calibration tokens: GPUs, or processes on a CPU's cores.
        seed: Seed of the data order.
    """
    checkpoint_dir = extend_checkpoint_dir(Path(checkpoint_dir))
    sub_network, out_dir = Path(sub_network), Path(out_dir)
    if sub_network.is_dir():
        check_checkpoint(checkpoint_dir)
        students = {path: out_dir / path.stem for path in _best_of_search(sub_network, devices)}
        finished = {
            path
            for path, folder in students.items()
            if not overwrite and is_finished(folder, key_of(checkpoint_dir, path, dtype, repair, data, train, seed))
        }
        for path in students.keys() - finished:
            check_out_dir(students[path], overwrite, (checkpoint_dir, path), WEIGHTS)
        for path, folder in students.items():
            if path in finished:
                print(f"{folder} is finished already.")
            else:
                setup(checkpoint_dir, path, folder, dtype, overwrite, repair, data, train, devices, seed)
                release_memory()  # the next repair looks how much is free
            print()
        print(_students_table(students))
        return
    check_seed(seed)
    teacher = check_checkpoint(checkpoint_dir)
    subnet = SubNet.load(sub_network, teacher)
    check_out_dir(out_dir, overwrite, (checkpoint_dir, sub_network), WEIGHTS)
    key = key_of(checkpoint_dir, sub_network, dtype, repair, data, train, seed)
    weights = read_weights(checkpoint_dir)
    tied = is_tied(weights)
    as_type = getattr(torch, dtype) if dtype else weights["lm_head.weight"].dtype
    counts: dict[str, Any] = _counts(subnet, tied)
    n_stored = max(counts["n_params"], counts.get("n_params_padded", 0))
    check_space(out_dir, n_stored * as_type.itemsize, "the student")

    n = _check_devices(devices, repair)
    repaired = scratch = None
    if repair and subnet == SubNet.full(teacher):
        print("The sub-network is the whole teacher, so there is nothing to repair.")
    elif repair:
        args = RepairArgs() if repair is True else repair
        length, size = _check_calibration(args, data, train, checkpoint_dir), train.micro_batch_size
        fabric = launch(n)
        n_tokens = args.n_tokens(subnet.config)
        fabric.print(f"Calibrating on {n_tokens:,} tokens (--repair.tokens)")
        windows = read_calibration(data, checkpoint_dir, size, length, n_tokens, seed, "repair.tokens")
        n_closed_form = -(-args.n_closed_form(subnet.config) // length)
        held_out = held_out_windows(data, length, windows.shape[1], n_held_out(*windows.shape))
        calibration = Calibration(windows, train.micro_batch_size, fabric.device, n_closed_form, held_out)
        scratch = _open_scratch(checkpoint_dir, subnet, calibration.windows, args, out_dir)
        try:
            repaired = SequentialRepair(weights, subnet, calibration, args, scratch).run(progress=rank() == 0)
        except UserError:  # the same command could not resume from it
            scratch.remove()
            raise
        if not shutdown():
            return  # every process has the whole student; the first one saves it
        subnet, student = repaired.subnet, repaired.weights
        counts |= {"repair": asdict(args) | {"basis": repaired.basis_name, "tokens": windows.numel(), "seed": seed}}
    if repaired is None:
        student = extract_weights(weights, subnet, tied)
    if dtype or repaired:
        _convert(student, as_type)
    origin = (read_choice(sub_network).get("provenance") or {}) | {
        "teacher": teacher.name,
        "teacher_config": fingerprint(teacher),
        "checkpoint_dir": str(checkpoint_dir.absolute()),
        "key": key,
        **counts,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "litgpt_whittle": version(),
    }
    choice = subnet.to_dict() | {"provenance": origin}
    extra = {BASIS: {"basis": repaired.basis}} if repaired else None
    save_checkpoint(out_dir.resolve(), subnet, student, checkpoint_dir, choice, extra)
    print(_summary(subnet, counts, sub_network, out_dir))
    if why := _why_not_convertible(subnet):
        print(f"Note: litgpt evaluate, convert_from_litgpt and export cannot hand it to transformers: {why}")
    if repaired:
        plot_repair(repaired.layers, out_dir / "repair.png")
        print(_repair_summary(repaired, calibration))
        if scratch is not None:
            scratch.remove()
    if not has_tokenizer(out_dir):
        print(f"Note: {checkpoint_dir} has no tokenizer, so neither has {out_dir}; `litgpt generate` needs one.")


def _why_not_convertible(subnet: SubNet) -> str | None:
    """Return the reason why the student's class in transformers cannot express it as saved; None if it can."""
    try:
        fit_heads(subnet.config, check_expressible(subnet.config))
    except UserError as error:
        return str(error)
    return None


def _best_of_search(folder: Path, devices: int | str) -> list[Path]:
    """Return the files of the best sub-networks in a search's folder."""
    found = sorted(path for path in folder.glob("best*.yaml") if not path.stem.endswith("-by-score"))
    if not found:
        raise UserError(
            f"{str(folder)!r} has no best*.yaml of a search; name a sub-network's YAML or a search's folder"
        )
    if n_devices(devices) > 1:
        raise UserError(f"several students are cut out with one device, got devices = {devices}; use --devices 1")
    return found


def key_of(
    checkpoint_dir: Path,
    sub_network: Path,
    dtype: str | None,
    repair: bool | RepairArgs,
    data: DataModule | None,
    train: BatchArgs,
    seed: int,
) -> str:
    """Return a fingerprint of all that determines a student: teacher weights, sub-network and settings."""
    inputs = [weights_fingerprint(checkpoint_dir), sub_network.read_text(), dtype, repair, seed]
    inputs += [describe(data), describe(train)] if repair else []  # only a repair reads data
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]


def is_finished(folder: Path, key: str) -> bool:
    """Return whether a folder already holds the student with this key."""
    path = folder / "sub_network.yaml"
    return path.is_file() and (read_choice(path).get("provenance") or {}).get("key") == key


def _students_table(students: Mapping[Path, Path]) -> str:
    """Return a table of a search's students, with the perplexities that the search measured."""
    lines = [f"{'student':<40}{'parameters':>14}{'perplexity as searched':>25}"]
    for folder in students.values():
        origin = read_choice(folder / "sub_network.yaml")["provenance"]
        searched = searched_perplexity(origin)
        measured = "not measured" if searched is None else f"{searched:.2f}"
        lines.append(f"{folder!s:<40}{origin['n_params']:>14,}{measured:>25}")
    return "\n".join(lines)


def _counts(subnet: SubNet, tied: bool) -> dict[str, int]:
    """Count the parameters of student and teacher, and of a non-uniform student's padded stock form."""
    counts = {
        "n_params": n_params(subnet.teacher, subnet, tied),
        "n_params_teacher": n_params(subnet.teacher, SubNet.full(subnet.teacher), tied),
    }
    if not subnet.is_uniform:
        counts["n_params_padded"] = n_params(subnet.config, SubNet.full(subnet.config), tied)
    return counts


def check(args: Namespace) -> None:
    """Run the checks that need no sub-network; `litgpt whittle` runs them before its first stage.

    Args:
        args: The command's arguments, by name.

    Raises:
        UserError: For the first invalid setting.
    """
    _check_devices(args.devices, args.repair)
    if args.repair:
        repair = RepairArgs() if args.repair is True else args.repair
        _check_calibration(repair, args.data, args.train, args.checkpoint_dir)


def _check_devices(devices: int | str, repair: bool | RepairArgs) -> int:
    n = n_devices(devices)
    if n > 1 and not repair:
        raise UserError(f"only a repair is shared by several devices, got devices = {n} without one; add --repair true")
    return n


def _check_calibration(repair: RepairArgs, data: DataModule | None, train: BatchArgs, checkpoint_dir: Path) -> int:
    """Check the settings of a repair's calibration, and return the length of its samples."""
    if data is None:
        raise UserError("a repair needs data to calibrate on; for example --data HFText --data.path PATH")
    teacher = check_checkpoint(checkpoint_dir)
    length = sequence_length(teacher, train.max_seq_length)
    check_n_windows(-(-(repair.tokens or LEAST_TOKENS) // length))
    check_data(data, checkpoint_dir, teacher.padded_vocab_size)
    return length


def _open_scratch(
    checkpoint_dir: Path, subnet: SubNet, windows: torch.Tensor, args: RepairArgs, out_dir: Path
) -> Scratch:
    """Open the repair's scratch folder beside `out_dir`, the same one after an interruption."""
    keys = [weights_fingerprint(checkpoint_dir), repr(subnet), repr(args)]
    scratch = scratch_beside(out_dir, "repair", windows, keys)
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
        "Repaired. The student's stream differs from the teacher's, in squares relative to each token's size, by",
        f"  {layers[-1].after:.1%} after the last block; a block left as cut would add up to {before:.1%} on average.",
    ]
    steps = {"the head was fitted to them": repaired.head, "all blocks were trained together": repaired.refined}
    if tried := {name: errors for name, errors in steps.items() if errors is not None}:
        before, after = next(iter(tried.values())).before, list(tried.values())[-1].after
        described = ", then ".join(f"{errors.after:.3f} when {name}" for name, errors in tried.items())
        n = len(calibration.held_out_windows) * calibration.shape[1]
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
        lines.append(f"  Left as cut: {', '.join(left)}.")
    return "\n".join(lines)


def _convert(weights: Weights, dtype: torch.dtype) -> None:
    """Convert in place, a tensor at a time, so that memory never holds two students; tied weights stay tied."""
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
        heads = "Its heads do not fill its channels, as transformers asks for."
        lines += [
            f"{heads if subnet.layers_are_alike else 'Its layers differ in width.'} Stock litgpt",
            f"opens it with the same outputs: {WEIGHTS} is padded with zeros to {counts['n_params_padded']:,}",
            f"parameters. litgpt_whittle.load_model opens its {after:,}.",
        ]
    weights = out_dir / WEIGHTS
    hint = try_next("generate", out_dir)
    return "\n".join([*lines, f"Saved {weights} ({readable_size(weights.stat().st_size)}). {hint}"])


def _sizes(subnet: SubNet) -> list[tuple[str, Any, str]]:
    """Return name, teacher's size and kept size of every dimension that shrank."""
    teacher = subnet.teacher
    keeps = [subnet.layer(i) for i in range(len(subnet))]
    dense = [keep for keep in keeps if keep.n_expert is None]
    experts = [keep for keep in keeps if keep.n_expert is not None]
    width = teacher.moe_intermediate_size or teacher.intermediate_size
    rows = [
        ("channels", teacher.n_embd, [len(subnet.n_embd)]),
        ("heads", teacher.n_head, [len(k.n_query_groups) * len(k.heads_per_group) for k in keeps]),
        ("head size", teacher.head_size, [len(subnet.head_size)]),
        ("neurons", teacher.intermediate_size, [len(k.intermediate_size) for k in dense]),
        ("experts", teacher.n_expert, [len(k.n_expert) for k in keeps if k.n_expert is not None]),
        ("per expert", width, [len(k.intermediate_size) for k in experts]),
    ]
    if teacher.n_query_groups != teacher.n_head:
        rows.insert(2, ("groups", teacher.n_query_groups, [len(k.n_query_groups) for k in keeps]))
    return [(name, of, _span(kept)) for name, of, kept in rows if kept and set(kept) != {of}]


def _span(sizes: list[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
