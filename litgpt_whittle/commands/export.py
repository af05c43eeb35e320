"""`litgpt export`: convert a checkpoint to a directory for other tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litgpt.utils import extend_checkpoint_dir

from litgpt_whittle.command_config import CommandConfig, Result, as_command
from litgpt_whittle.errors import UserError
from litgpt_whittle.files import check_out_dir
from litgpt_whittle.hf.export import Exported, export_hf
from litgpt_whittle.hf.gguf import export_gguf, find_converter
from litgpt_whittle.hf.hub import check_hub, push
from litgpt_whittle.processes import lock_output


@dataclass
class ExportConfig(CommandConfig):
    """Export a checkpoint for transformers, vLLM, llama.cpp and tools that build on them."""

    checkpoint_dir: Path
    """The litgpt checkpoint's directory."""
    format: Literal["hf", "deci", "gguf"] = "hf"
    """Output format: ``hf`` writes a Hugging Face directory, with layers that differ in width padded to the widest;
    ``deci`` writes such layers of a Llama in their true shapes, for vLLM; ``gguf`` writes a file for llama.cpp."""
    out_dir: Path = Path("out/export")
    """Output directory."""
    max_shard_size: str = "5GB"
    """Maximum size of a weights file."""
    check: bool = True
    """Load the exported model with transformers and compare its logits with litgpt's, one model after the other in
    float32; if they differ, nothing is exported."""
    converter: Path | None = None
    """llama.cpp's ``convert_hf_to_gguf.py``, for ``gguf``; by default the one on ``PATH``."""
    gguf_type: Literal["auto", "f32", "f16", "bf16"] = "auto"
    """Data type of the matrices in a GGUF file; ``auto`` is the 16-bit type closest to the checkpoint's."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face Hub to upload the directory to, such as ``user/model``."""
    private: bool = False
    """Make a new repository private."""
    overwrite: bool = False
    """Replace the model in ``out_dir``."""

    def __post_init__(self) -> None:
        self.checkpoint_dir, self.out_dir = extend_checkpoint_dir(Path(self.checkpoint_dir)), Path(self.out_dir)

    def validate(self) -> None:
        marker = "*.gguf" if self.format == "gguf" else "model*.safetensors"
        check_out_dir(self.out_dir, self.overwrite, (self.checkpoint_dir,), marker)
        if self.format == "gguf":
            find_converter(self.converter)
        elif self.converter is not None:
            raise UserError(f"only gguf needs a converter, got --format {self.format}; leave --converter out")
        if self.format != "gguf" and self.gguf_type != "auto":
            raise UserError(f"gguf_type has no effect with --format {self.format}; leave it out, or choose gguf")
        if self.push_to_hub is not None:
            check_hub(self.push_to_hub)
        elif self.private:
            raise UserError("private concerns a repository, and there is none; add --push_to_hub or leave it out")

    def run(self) -> Result:
        """Export the checkpoint.

        Raises:
            UserError: If the model cannot be exported in this format, or the logits differ.
        """
        with lock_output(self.out_dir):
            self.validate()
            exported = self._export()
        model = f"{exported.architecture}, {exported.n_params:,} parameters"
        lines = [f"Exported {self.checkpoint_dir} to {self.out_dir}: {model}", *exported.notes]
        if exported.difference is None:
            lines.append("It was not compared with litgpt's model (--check false).")
        else:
            lines.append(f"Its logits differ from litgpt's by at most {exported.difference:.1e} of the largest logit.")
        if self.push_to_hub is not None:
            lines.append(f"Uploaded to {push(self.out_dir, self.push_to_hub, self.private)}")
        return Result(self.out_dir, summary="\n".join(lines))

    def _export(self) -> Exported:
        source, out_dir = self.checkpoint_dir, self.out_dir.resolve()
        if self.format == "gguf":
            return export_gguf(source, out_dir, self.converter, self.gguf_type, self.check)
        return export_hf(source, out_dir, self.max_shard_size, self.check, self.format, self.push_to_hub)


setup = as_command(ExportConfig)
