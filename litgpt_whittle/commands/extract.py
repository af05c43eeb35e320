"""`litgpt extract`: cut a sub-network out of its teacher, as a litgpt checkpoint that stock litgpt opens."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.checkpoint import WEIGHTS, check_checkpoint, read_weights, save_checkpoint
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_writable
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.subnet import SubNet, fingerprint, read_choice
from litgpt_whittle.supergpt import Weights, extract, is_tied

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def setup(
    checkpoint_dir: Path,
    sub_network: Path,
    out_dir: Path = Path("out/extract"),
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Cut a sub-network out of a checkpoint.

    Arguments:
        checkpoint_dir: The teacher's checkpoint directory.
        sub_network: The YAML that says what to keep, such as ``best.yaml`` of ``litgpt search``.
        out_dir: Where the student's checkpoint goes.
        dtype: Store the weights as this type; by default as the teacher stores them.
        overwrite: Replace the checkpoint in ``out_dir``.
    """
    checkpoint_dir = extend_checkpoint_dir(Path(checkpoint_dir))
    sub_network, out_dir = Path(sub_network), Path(out_dir)
    teacher = check_checkpoint(checkpoint_dir)
    subnet = SubNet.load(sub_network, teacher)
    _check_out_dir(out_dir, overwrite, needed=(checkpoint_dir, sub_network))
    weights = read_weights(checkpoint_dir)
    tied = is_tied(weights)
    as_type = getattr(torch, dtype) if dtype else weights["lm_head.weight"].dtype
    counts = _counts(subnet, tied)
    _check_space(out_dir, max(counts["n_params"], counts.get("n_params_padded", 0)) * as_type.itemsize)

    student = extract(weights, subnet, tied)
    if dtype:
        _convert(student, as_type)
    origin = (read_choice(sub_network).get("provenance") or {}) | {
        "teacher": teacher.name,
        "teacher_config": fingerprint(teacher),
        "checkpoint_dir": str(checkpoint_dir.absolute()),
        **counts,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "litgpt_whittle": _version(),
    }
    choice = subnet.to_dict() | {"provenance": origin}
    save_checkpoint(out_dir.resolve(), subnet, student, tokenizer_dir=checkpoint_dir, sub_network=choice)
    print(_summary(subnet, counts, sub_network, out_dir))
    if not any((out_dir / name).is_file() for name in TOKENIZER_FILES):
        print(f"Note: {checkpoint_dir} has no tokenizer, so neither has {out_dir}; `litgpt generate` needs one.")


def _check_out_dir(out_dir: Path, overwrite: bool, needed: Iterable[Path]) -> None:
    """Refuses an output directory that cannot be written, or whose contents would be lost."""
    check_writable(out_dir)
    # the student is written beside and renamed into place
    check_writable(out_dir.resolve().parent)
    if not out_dir.exists() or not any(out_dir.iterdir()):
        return
    shown = repr(str(out_dir))
    if not overwrite:
        raise UserError(f"out_dir must be empty or new, got {shown}; choose another or add --overwrite true")
    for path in needed:
        if path.resolve().is_relative_to(out_dir.resolve()):
            raise UserError(f"out_dir must not hold what is read, got {shown} with {str(path)!r}; choose another")
    if not (out_dir / WEIGHTS).is_file() or any(entry.is_dir() for entry in out_dir.iterdir()):
        raise UserError(f"--overwrite replaces a checkpoint and nothing else, got {shown}; choose another out_dir")


def _check_space(out_dir: Path, n_bytes: int) -> None:
    nearest = out_dir.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    if free < n_bytes:
        raise UserError(
            f"the student takes {_size(n_bytes)} and {str(nearest)!r} has {_size(free)} left; free some "
            "space or choose another out_dir"
        )


def _counts(subnet: SubNet, tied: bool) -> dict[str, int]:
    """Parameters of student and teacher; of the student's padded stock form too, where that is larger."""
    counts = {
        "n_params": n_params(subnet.teacher, subnet, tied),
        "n_params_teacher": n_params(subnet.teacher, SubNet.full(subnet.teacher), tied),
    }
    if not subnet.is_uniform:
        counts["n_params_padded"] = n_params(subnet.config, SubNet.full(subnet.config), tied)
    return counts


def _convert(weights: Weights, dtype: torch.dtype) -> None:
    """Converts in place, a tensor at a time, so that two students never lie in memory; tied weights stay tied."""
    done: dict[int, torch.Tensor] = {}
    for name in list(weights):
        tensor = weights[name]
        if tensor.data_ptr() not in done:
            done[tensor.data_ptr()] = tensor.to(dtype)
        weights[name] = done[tensor.data_ptr()]


def _version() -> str:
    try:
        return metadata.version("litgpt-whittle")
    except metadata.PackageNotFoundError:  # run from its source folder
        return "unknown"


def _summary(subnet: SubNet, counts: dict[str, int], sub_network: Path, out_dir: Path) -> str:
    """What was done, in a few lines for people."""
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
            f"Its layers differ in width. Stock litgpt opens it with the same outputs: {WEIGHTS} is padded with zeros",
            f"to {counts['n_params_padded']:,} parameters. litgpt_whittle.load_model opens its {after:,}.",
        ]
    weights = out_dir / WEIGHTS
    return "\n".join([*lines, f"Saved {weights} ({_size(weights.stat().st_size)}). Try: litgpt generate {out_dir}"])


def _sizes(subnet: SubNet) -> list[tuple[str, Any, str]]:
    """Name, teacher's size and kept size of every dimension that shrank."""
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
        ("experts", teacher.n_expert, [len(k.n_expert) for k in experts]),
        ("per expert", width, [len(k.intermediate_size) for k in experts]),
    ]
    if teacher.n_query_groups != teacher.n_head:
        rows.insert(2, ("groups", teacher.n_query_groups, [len(k.n_query_groups) for k in keeps]))
    return [(name, of, _span(kept)) for name, of, kept in rows if kept and set(kept) != {of}]


def _span(sizes: list[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"


def _size(n_bytes: int) -> str:
    """Bytes as people read them."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
