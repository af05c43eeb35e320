"""`litgpt export`: convert a checkpoint to a directory for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.files import check_out_dir
from litgpt_whittle.hf.export import export_hf
from litgpt_whittle.processes import locks_output


@locks_output
def setup(
    checkpoint_dir: Path,
    format: Literal["hf"] = "hf",
    out_dir: Path = Path("out/export"),
    max_shard_size: str = "5GB",
    check: bool = True,
    overwrite: bool = False,
) -> None:
    """Export a checkpoint as a Hugging Face directory, for transformers and tools that build on it.

    Arguments:
        checkpoint_dir: The litgpt checkpoint's directory.
        format: Output format: ``hf`` writes ``config.json``, safetensors and the tokenizer's files.
        out_dir: Output directory.
        max_shard_size: Maximum size of a weights file.
        check: Load the exported model with transformers and compare its logits with litgpt's, one model after the
            other in float32; if they differ, nothing is exported.
        overwrite: Replace the model in ``out_dir``.
    """
    checkpoint_dir, out_dir = extend_checkpoint_dir(Path(checkpoint_dir)), Path(out_dir)
    check_out_dir(out_dir, overwrite, (checkpoint_dir,), "model*.safetensors")
    exported = export_hf(checkpoint_dir, out_dir.resolve(), max_shard_size, check)
    print(f"Exported {checkpoint_dir} to {out_dir}: {exported.family.architecture}, {exported.n_params:,} parameters")
    if exported.zero_heads:
        print(f"Its heads have n_embd / n_head dimensions there: {exported.zero_heads} of zeros fill up each layer.")
    if exported.needs_eager_experts:
        print(
            "Open it with experts_implementation='eager': the default needs rows of 16 bytes in the experts' weights."
        )
    if exported.difference is None:
        print("It was not compared with litgpt's model (--check false).")
    else:
        print(f"Its logits differ from litgpt's by at most {exported.difference:.1e} of the largest.")
