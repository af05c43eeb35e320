"""Write an exported model's card: its origin, sizes, measurements and how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from litgpt_whittle.files import to_yaml
from litgpt_whittle.hf.student import Student
from litgpt_whittle.licenses import license_in, license_of, read_mapping
from litgpt_whittle.metrics_log import read_metrics

_TRAINING = ("distill", "train", "optimizer", "precision", "seed")
"""Settings of a training that the card lists; others are paths or concern the machine"""

_SEARCH = ("strategy", "space", "order", "bin")
"""Settings of a search that the card lists"""

_LOAD = {
    "hf": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```""",
    "deci": """\
Its layers differ in width; `config.json` lists their sizes in `block_configs`.

```bash
vllm serve {name} --trust-remote-code
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```""",
    "gguf": """\
```bash
llama-cli -m {name}
```""",
}
"""Instructions to load a model, by format; {name} is the directory's or the file's name"""


def model_card(student: Student, layout: str, name: str, n_stored: int) -> str:
    """Return a model card in Markdown, with the metadata of the Hugging Face Hub in YAML.

    Args:
        student: The exported checkpoint.
        layout: Name of the format: "hf", "deci" or "gguf".
        name: Name of the directory or file to load.
        n_stored: Number of stored parameters, including padding.
    """
    sections = {
        "Sizes": _sizes(student, n_stored),
        "Origin": _origin(student),
        "Measurements": _measurements(student),
        "Usage": _LOAD[layout].format(name=name),
    }
    parts = [f"---\n{to_yaml(_metadata(student, layout))}---", f"# {student.config.name}"]
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def _metadata(student: Student, layout: str) -> dict[str, Any]:
    origin = student.config.hf_config or {}
    base_model = f"{origin['org']}/{origin['name']}" if origin.get("org") and origin.get("name") else None
    metadata = {
        "library_name": "gguf" if layout == "gguf" else "transformers",
        "pipeline_tag": "text-generation",
        **_license(student),
        "base_model": base_model,
        "tags": ["litgpt", "litgpt_whittle"],
    }
    return {key: value for key, value in metadata.items() if value is not None}


def _license(student: Student) -> dict[str, str]:
    """Return the license in the teacher's `config.json`, else of the student's folder or the teacher's."""
    teacher = student.provenance.get("checkpoint_dir")
    folders = [student.checkpoint_dir, *([Path(teacher)] if isinstance(teacher, str) else [])]
    found = (license_in(student.hf_config), *map(license_of, folders))
    return next(filter(None, found), {})


def _sizes(student: Student, n_stored: int) -> str:
    config, shape = student.config, student.shape
    padded = "" if n_stored == student.n_params else f" ({n_stored:,} with zeros, to which the layers are padded)"
    layers = [shape.layer(i).sizes for i in range(len(shape))]
    rows = {
        "parameters": f"{student.n_params:,}{padded}",
        "layers": f"{config.n_layer}",
        "channels": f"{config.n_embd:,}",
        "query heads": _per_layer(groups * per_group for groups, per_group, _, _ in layers),
        "key and value heads": _per_layer(groups for groups, _, _, _ in layers),
        "dimensions of a head": f"{config.head_size}",
        "neurons": _per_layer(neurons for _, _, neurons, _ in layers),
        "vocabulary": f"{config.padded_vocab_size:,}",
        "context": f"{config.block_size:,}",
    }
    if config.mlp_class_name == "LLaMAMoE":
        rows["experts"] = _per_layer(n_expert for _, _, _, n_expert in layers)
    return _table("size", "value", rows)


def _per_layer(sizes: Iterable[int]) -> str:
    """Return the size of all layers, or of each layer from the first to the last."""
    runs = [(size, len(list(run))) for size, run in groupby(sizes)]
    if len(runs) == 1:
        return f"{runs[0][0]:,}"
    return ", ".join(f"{size:,}" if n == 1 else f"{size:,} (×{n})" for size, n in runs)


def _table(name: str, value: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"| {name} | {value} |", "| --- | --- |", *(f"| {key} | {row} |" for key, row in rows.items())])


def _origin(student: Student) -> str:
    """Return how the student was made: its teacher, and the settings of search, repair and training."""
    origin, parts = student.provenance, []
    if {"teacher", "n_params", "n_params_teacher"} <= origin.keys():
        share = f"{origin['n_params']:,} of its {origin['n_params_teacher']:,} parameters"
        parts.append(f"A sub-network of {origin['teacher']}, cut out of it with {share} by litgpt_whittle.")
    settings = {
        "Search": {key: origin[key] for key in _SEARCH if origin.get(key) is not None},
        "Repair in closed form": origin.get("repair"),
        "Training": {key: value for key, value in _training(student).items() if key in _TRAINING},
    }
    parts += [f"{title}:\n\n```yaml\n{to_yaml(values)}```" for title, values in settings.items() if values]
    return "\n\n".join(parts)


def _training(student: Student) -> dict[str, Any]:
    """Return the arguments of the training that wrote the checkpoint; empty if it was not trained."""
    return read_mapping(student.checkpoint_dir / "hyperparameters.yaml")


def _measurements(student: Student) -> str:
    """Return the losses and perplexities that search and training have recorded."""
    origin, rows = student.provenance, {}
    searched = {
        "perplexity": ("perplexity in the search, plain cut", ".2f"),
        "repaired_perplexity": ("… after a repair", ".2f"),
        "bits_per_byte": ("… in bits per byte of text", ".4f"),
    }
    for key, (title, digits) in searched.items():
        if isinstance(value := origin.get(key), float):
            rows[title] = format(value, digits)
    if _training(student):
        folder = student.checkpoint_dir.resolve()
        metrics = read_metrics(folder.parent / "metrics.jsonl")
        step = int(folder.name.removeprefix("step-")) if re.fullmatch(r"step-\d+", folder.name) else None
        losses = [row for row in metrics if "val_loss" in row and (step is None or row.get("step", 0) <= step)]
        if losses:
            rows["validation loss, nats per token"] = f"{losses[-1]['val_loss']:.4f}"
        if teacher := [row["teacher_val_loss"] for row in metrics if "teacher_val_loss" in row]:
            rows["… of the teacher"] = f"{teacher[0]:.4f}"
    return _table("measure", "value", rows) if rows else ""
