"""Export a checkpoint as a GGUF file, by llama.cpp's own converter."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

from litgpt_whittle.checkpoint import has_tokenizer
from litgpt_whittle.errors import UserError
from litgpt_whittle.extras import require
from litgpt_whittle.families import family_name
from litgpt_whittle.files import check_space, new_folder, write_text
from litgpt_whittle.hf.card import model_card
from litgpt_whittle.hf.export import Exported, export_hf
from litgpt_whittle.hf.narrow import narrow_layers
from litgpt_whittle.hf.student import Student

logger = logging.getLogger(__name__)

_CONVERTER = "convert_hf_to_gguf.py"


def export_gguf(
    checkpoint_dir: Path, out_dir: Path, converter: Path | None = None, dtype: str = "auto", check: bool = True
) -> Exported:
    """Write a directory with a GGUF file atomically, replacing an older one.

    The converter reads a Hugging Face directory, which is written next to the file and removed in the end. That
    directory is padded if layers differ in width. The padding is then removed from the file of a Llama
    (`narrow_layers`); other architectures of llama.cpp have equal layers.

    Args:
        checkpoint_dir: A litgpt checkpoint.
        out_dir: The output directory. The file has its name.
        converter: Path of llama.cpp's `convert_hf_to_gguf.py`; None looks for it on `PATH`.
        dtype: Data type of the matrices: "f32", "f16", "bf16", or "auto" for the 16-bit type closest to the
            checkpoint's.
        check: If true, compare the logits of the Hugging Face directory with litgpt's before it is converted.

    Raises:
        UserError: As `export_hf`, if there is no converter, if it fails, if the package gguf is missing, or if the
            tokenizer has tokens that the model does not have.
    """
    converter = find_converter(converter)
    student = Student.open(checkpoint_dir)
    _check_vocabulary(student)
    is_narrowed = not student.shape.layers_are_alike and family_name(student.config) == "Llama"
    if is_narrowed:
        require("gguf", "gguf", "a GGUF file of layers that differ in width")
    check_space(out_dir, 3 * student.n_params * student.dtype.itemsize, "the exported model, before its conversion")
    name = out_dir.name
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out_dir) as folder:
        padded, file = folder / "hf", folder / f"{name}.gguf"
        exported = export_hf(checkpoint_dir, padded, check=check)
        _convert(converter, padded, file, dtype, student.config.name)
        shutil.rmtree(padded)
        n_params = narrow_layers(file, student.shape) if is_narrowed else exported.n_params
        write_text(folder / "README.md", model_card(student, "gguf", file.name, n_params))
    notes = () if is_narrowed or student.shape.layers_are_alike else ("Its layers are padded to one width.",)
    return Exported(f"{name}.gguf", n_params, notes, exported.difference)


def find_converter(converter: Path | None = None) -> Path:
    """Return the path of llama.cpp's converter.

    Args:
        converter: The path given by the user; None looks for `convert_hf_to_gguf.py` on `PATH`.

    Raises:
        UserError: If there is no such file.
    """
    if converter is None:
        found = shutil.which(_CONVERTER)
        if found is None:
            raise UserError(
                f"--format gguf needs llama.cpp's {_CONVERTER}, which is not on PATH; clone "
                f"https://github.com/ggml-org/llama.cpp and set --converter llama.cpp/{_CONVERTER}"
            )
        return Path(found)
    if not converter.is_file():
        raise UserError(f"converter must be llama.cpp's {_CONVERTER}, got {str(converter)!r}; check the path")
    return converter


def _check_vocabulary(student: Student) -> None:
    """Check that the model has all tokens of its tokenizer; llama.cpp does not load the file otherwise.

    Raises:
        UserError: If it has not, or if `transformers` cannot open the tokenizer, which the converter does as well.
    """
    if not has_tokenizer(student.checkpoint_dir):
        return
    from transformers import AutoTokenizer

    try:
        n = len(AutoTokenizer.from_pretrained(student.checkpoint_dir, local_files_only=True))
    except Exception as error:  # any error of the tokenizer's own class
        raise UserError(
            f"transformers does not open the tokenizer in {str(student.checkpoint_dir)!r} ({type(error).__name__}); "
            "fetch its files again"
        ) from error
    if n > student.config.padded_vocab_size:
        raise UserError(
            f"llama.cpp needs an embedding for each token, got {n:,} tokens in the tokenizer and "
            f"{student.config.padded_vocab_size:,} in the model; remove the added tokens from tokenizer_config.json"
        )


def _convert(converter: Path, model_dir: Path, file: Path, dtype: str, name: str) -> None:
    """Run the converter; a terminal shows its progress.

    Raises:
        UserError: If it fails; the message has the last line of its output.
    """
    command = [sys.executable, str(converter), str(model_dir), "--outfile", str(file), "--outtype", dtype]
    command += ["--model-name", name]
    logger.info(f"Converting by {converter}")
    last = ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:  # each update of its progress bar is a line
            last = line.strip() or last
            if "%|" in line and sys.stderr.isatty():
                print(last, end="\n" if "100%|" in line else "\r", file=sys.stderr)
    if process.returncode != 0 or not file.is_file():
        raise UserError(
            f"llama.cpp's converter failed ({last or f'exit code {process.returncode}'}), so nothing was exported; "
            "update llama.cpp and the packages that its converter needs, or use --format hf"
        )
