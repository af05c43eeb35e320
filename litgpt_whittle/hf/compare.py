"""Compare an exported model's logits with litgpt's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.errors import UserError

_CHECKED_TOKENS = 64
_TOLERANCE = 1e-3
"""Tolerance relative to the largest logit. Rounding stays below 1e-4; a wrong activation, norm or rotary setting does
not"""


@torch.inference_mode()
def check_logits(checkpoint_dir: Path, folder: Path, model_class: Any) -> float:
    """Check that an exported model computes litgpt's logits of random tokens; both models run in float32.

    Args:
        checkpoint_dir: The litgpt checkpoint.
        folder: The exported directory.
        model_class: The class of `transformers` that opens it.

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        UserError: If `transformers` does not load the model correctly, or the difference exceeds `_TOLERANCE`.
    """
    reference = load_model(checkpoint_dir, dtype=torch.float32)
    config, generator = reference.config, torch.Generator().manual_seed(0)
    idx = torch.randint(config.vocab_size, (1, min(_CHECKED_TOKENS, config.block_size)), generator=generator)
    expected = reference(idx)  # (1, T, V)
    del reference
    difference = _open(folder, model_class)(idx).logits.sub_(expected).abs().max().item() / expected.abs().max().item()
    if not difference <= _TOLERANCE:
        raise UserError(
            f"the exported model's logits differ from litgpt's by {difference:.1e} of the largest, so nothing was "
            "exported; the checkpoint's model_config.yaml has a setting that its class in transformers does not support"
        )
    return difference


def _open(folder: Path, model_class: Any) -> torch.nn.Module:
    """Load the exported model in float32.

    Raises:
        UserError: If `transformers` cannot load it, or reports missing, unexpected or mismatched weights.
    """
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", local_files_only=True
        )
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the default cannot run all widths, see `padded.py`
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise UserError(f"transformers does not open the exported model ({reason}), so nothing was exported") from error
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise UserError(
                f"transformers reports {kind.replace('_', ' ')} in the exported model, such as {min(info[kind])}, so "
                "nothing was exported; the checkpoint's model_config.yaml has a setting that its class does not support"
            )
    return model.float().eval()
