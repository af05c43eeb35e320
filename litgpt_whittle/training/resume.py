"""Find and load the training state to resume from, and check that the settings have not changed.

`Run.training_state` and `Run.restore` (`litgpt_whittle.training.run`) create and restore the state. A resumed run has
the same weights, data and random numbers as an uninterrupted one.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from litgpt_whittle.checkpoint import WEIGHTS
from litgpt_whittle.errors import UserError
from litgpt_whittle.manifest import check_unchanged
from litgpt_whittle.sharded_checkpoint import (
    has_parts,
    read_parts,
)

TRAINING_STATE = "training_state.pth"


def rng_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and PyTorch's global generators, loadable with `weights_only`."""
    legacy: Any = np.random.get_state()
    _, keys, *rest = legacy
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the state returned by `rng_state`."""
    random.setstate(state["python"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


def find_resume(resume: bool | Literal["auto"] | Path, out_dir: Path) -> Path | None:
    """Return the checkpoint directory to resume from; None for a new run.

    Args:
        resume: As in `litgpt pretrain`: a checkpoint directory, `True` for the latest one in `out_dir`, or "auto" for
            the latest one if there is one.
        out_dir: The run's output folder.

    Raises:
        UserError: If there is nothing to resume from, or if `out_dir` has weights that would be overwritten.
    """
    if not resume:
        _check_unused(Path(out_dir))
        return None
    if isinstance(resume, Path):
        folder = resume.parent if resume.suffix == ".pth" else resume
        if not has_training_state(folder):
            raise UserError(
                f"resume must be a checkpoint directory of a run, with a {TRAINING_STATE} in it, got {str(resume)!r}; "
                "to start from weights alone use --initial_checkpoint_dir"
            )
        return folder
    found = [folder for folder in Path(out_dir).glob("step-*") if has_training_state(folder)]
    latest = max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)
    final = Path(out_dir) / "final"
    if has_training_state(final):
        steps = load_training_state(final)["step_count"]
        if latest is None or steps >= int(latest.name.removeprefix("step-")):
            latest = final
    if latest is None and resume is True:
        raise UserError(f"nothing to resume in out_dir {str(out_dir)!r}; leave --resume out or use --resume auto")
    return latest


def _check_unused(out_dir: Path) -> None:
    """Raise UserError if `out_dir` has checkpoints of another run, so that checkpoints of two runs are never mixed."""
    if (out_dir / WEIGHTS).is_file():
        raise UserError(
            f"out_dir must not be a checkpoint directory, as training would write into it, got {str(out_dir)!r}; "
            "choose another --out_dir"
        )
    if (out_dir / "final" / WEIGHTS).is_file() or any(out_dir.glob("step-*")):
        raise UserError(
            f"out_dir {str(out_dir)!r} has checkpoints of another training; resume it with --resume auto, or choose "
            "another --out_dir"
        )


def has_training_state(folder: Path) -> bool:
    """Return whether a folder is a checkpoint from which a run can resume."""
    return (Path(folder) / TRAINING_STATE).is_file() or has_parts(folder)


def load_training_state(folder: Path) -> dict[str, Any]:
    """Load a checkpoint's training state, without executing code from the file.

    Raises:
        UserError: If it cannot be read.
    """
    if has_parts(folder):
        return read_parts(folder, "training")
    try:
        return torch.load(Path(folder) / TRAINING_STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{str(Path(folder) / TRAINING_STATE)!r} cannot be read ({type(error).__name__}); resume from another "
            "checkpoint"
        ) from None


def state_to_resume(folder: Path | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the training state in the checkpoint directory to resume from; None for a new run.

    Raises:
        UserError: If the state cannot be read, or if it belongs to a run with other settings.
    """
    if folder is None:
        return None
    state = load_training_state(folder)
    remedy = "start a new run from its weights with --initial_checkpoint_dir"
    check_unchanged("a resumed run", state["settings"], settings, remedy)
    return state
