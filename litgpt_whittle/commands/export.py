"""`litgpt export`: convert a checkpoint to a directory for other tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.command_config import CommandConfig, as_command
from litgpt_whittle.files import check_out_dir
from litgpt_whittle.hf.export import export_hf
from litgpt_whittle.processes import lock_output


@dataclass
class ExportConfig(CommandConfig):
    """Export a checkpoint as a Hugging Face directory, for transformers and tools that build on it."""

    checkpoint_dir: Path
    """The litgpt checkpoint's directory."""
    format: Literal["hf"] = "hf"
    """Output format: ``hf`` writes ``config.json``, safetensors and the tokenizer's files."""
    out_dir: Path = Path("out/export")
    """Output directory."""
    max_shard_size: str = "5GB"
    """Maximum size of a weights file."""
    check: bool = True
    """Load the exported model with transformers and compare its logits with litgpt's, one model after the other in
    float32; if they differ, nothing is exported."""
    overwrite: bool = False
    """Replace the model in ``out_dir``."""

    def __post_init__(self) -> None:
        self.checkpoint_dir, self.out_dir = extend_checkpoint_dir(Path(self.checkpoint_dir)), Path(self.out_dir)

    def validate(self) -> None:
        check_out_dir(self.out_dir, self.overwrite, (self.checkpoint_dir,), "model*.safetensors")

    def run(self) -> Path:
        """Export the checkpoint.

        Returns:
            The exported folder.

        Raises:
            UserError: If the family cannot be exported, or the logits differ.
        """
        with lock_output(self.out_dir):
            self.validate()
            exported = export_hf(self.checkpoint_dir, self.out_dir.resolve(), self.max_shard_size, self.check)
        print(
            f"Exported {self.checkpoint_dir} to {self.out_dir}: {exported.family.architecture}, "
            f"{exported.n_params:,} parameters"
        )
        if exported.zero_heads:
            print(
                f"Its heads need n_embd / n_head dimensions there: each layer is padded with "
                f"{exported.zero_heads} zero heads."
            )
        if exported.needs_eager_experts:
            print(
                "Open it with experts_implementation='eager': the default needs rows of a multiple of 16 bytes in the "
                "experts' weights."
            )
        if exported.difference is None:
            print("It was not compared with litgpt's model (--check false).")
        else:
            print(f"Its logits differ from litgpt's by at most {exported.difference:.1e} of the largest logit.")
        return self.out_dir


setup = as_command(ExportConfig)
