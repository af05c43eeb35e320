"""Export a litgpt checkpoint as a Hugging Face model directory with the same outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import save_torch_state_dict

from litgpt_whittle.files import check_space, new_folder, write_text
from litgpt_whittle.hf.card import model_card
from litgpt_whittle.hf.compare import check_logits
from litgpt_whittle.hf.deci import deci_model
from litgpt_whittle.hf.model import HFModel
from litgpt_whittle.hf.padded import padded_model
from litgpt_whittle.hf.student import Student
from litgpt_whittle.quantities import parse_amount
from litgpt_whittle.tokenizer_files import copy_contents, copy_tokenizer

LAYOUTS: dict[str, Callable[[Student], HFModel]] = {"hf": padded_model, "deci": deci_model}
"""Functions that express a student as a model of `transformers`, by name of the format"""


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    architecture: str
    """Name of the model's class, or of the file's architecture"""
    n_params: int
    """Number of stored parameters, including padding"""
    notes: tuple[str, ...]
    """Notes for users of the directory, one sentence each"""
    difference: float | None
    """Largest difference of a logit from litgpt's, relative to the largest logit; `None` if not checked"""


def export_hf(
    checkpoint_dir: Path,
    out_dir: Path,
    max_shard_size: int | str = "5GB",
    check: bool = True,
    layout: str = "hf",
    repository: str | None = None,
) -> Exported:
    """Write a Hugging Face directory atomically, replacing an older one.

    Args:
        checkpoint_dir: A litgpt checkpoint.
        out_dir: The output directory.
        max_shard_size: Maximum size of a weights file: a number of bytes, or a text such as "5GB".
        check: If true, load the directory with `transformers` and compare the logits of random tokens with litgpt's.
        layout: "hf" pads the layers of a layer-wise student with zeros; "deci" writes them in their true shape.
        repository: Repository of the Hugging Face Hub from which the model card loads the model; None if it is not
            uploaded.

    Raises:
        UserError: If the checkpoint cannot be read or converted by litgpt, if the model's class in `transformers`
            cannot express it, if the disk is full, or if the check finds a difference.
    """
    n_bytes = int(parse_amount(max_shard_size, "bytes"))
    student = Student.open(checkpoint_dir)
    model = LAYOUTS[layout](student)
    check_space(out_dir, model.n_params * student.dtype.itemsize, "the exported model")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out_dir) as folder:
        copy_tokenizer(checkpoint_dir, folder, for_litgpt=False)
        for path in model.code:
            copy_contents(path, folder / path.name)
        write_text(folder / "config.json", json.dumps(model.content, indent=2))
        name = repository or out_dir.name
        write_text(folder / "README.md", model_card(student, layout, name, model.n_params))
        save_torch_state_dict(model.weights(), folder, max_shard_size=n_bytes)
        for file in folder.glob("*.safetensors"):  # safetensors makes its files readable by the user only
            shutil.copymode(folder / "config.json", file)
        difference = check_logits(checkpoint_dir, folder, model.model_class()) if check else None
    return Exported(model.architecture, model.n_params, model.notes, difference)
