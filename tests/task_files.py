"""Local tasks of lm-eval, in the file formats of users."""

import json
import random
from pathlib import Path

import yaml
from texts import WORDS


def write_task(folder: Path, name: str, rows: list[dict], **settings) -> Path:
    """Write a task's YAML and its documents; return the path of the YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    task |= {"test_split": "test", "doc_to_text": "text", "output_type": "multiple_choice"}
    task |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task | settings))
    return path


def metrics(*names: str) -> list[dict]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(WORDS, k=n))


def questions(n: int, seed: int = 0) -> list[dict]:
    """Return questions with three answers of different lengths."""
    rng = random.Random(seed)
    return [
        {
            "text": sentence(rng, rng.randint(2, 9)),
            "choices": [sentence(rng, rng.randint(1, 4)) for _ in range(3)],
            "answer": rng.randrange(3),
        }
        for _ in range(n)
    ]


def write_tasks(folder: Path, n: int = 12) -> Path:
    """Write a folder of three tasks: endings judged by `acc_norm`, letters by `acc`, and last words."""
    rows = questions(n)
    chosen = {"doc_to_choice": "choices", "doc_to_target": "answer"}
    write_task(folder, "endings", rows, **chosen, metric_list=metrics("acc", "acc_norm"))
    letters = {"doc_to_text": "{{text}}\nAnswer:", "doc_to_choice": ["A", "B", "C"], "doc_to_target": "answer"}
    write_task(folder, "letters", questions(n, 1), **letters)
    write_task(folder, "words", questions(n, 2), output_type="loglikelihood", doc_to_target="{{choices[answer]}}")
    return folder
