"""Measure models of one tokenizer on two tasks made from documents that no model was trained or calibrated on.

    python benchmarks/real/tasks.py --documents wikipedia-validation.parquet --model teacher=CHECKPOINT_DIR \
        --model student=CHECKPOINT_DIR

`next_sentence` asks which of four sentences follows the first sentence of an article; three are the second sentences of
other articles. `last_word` asks for the last word of the second sentence, which the most likely tokens must spell.
"""

import argparse
import json
import random
import re
import tempfile
from pathlib import Path

import pandas
import yaml

from litgpt_whittle import load_model
from litgpt_whittle.checkpoint import check_checkpoint
from litgpt_whittle.tasks import TaskArgs
from litgpt_whittle.tasks.harness import read_tasks

N_CHOICES = 4
MAX_LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=Path, required=True, help="a Parquet file with a column `text`")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=DIR", help="checkpoints to measure")
    parser.add_argument("--limit", type=int, help="documents per task; by default all")
    args = parser.parse_args()
    models = {name: Path(folder) for name, folder in (model.split("=", 1) for model in args.model)}
    with tempfile.TemporaryDirectory() as folder:
        names = write_tasks(pairs(args.documents), Path(folder))
        first = next(iter(models.values()))
        check_checkpoint(first)
        tasks = read_tasks(TaskArgs(names=names, limit=args.limit), first, MAX_LENGTH)
        for name, checkpoint in models.items():
            results = tasks.measure(load_model(checkpoint).eval(), name)
            cells = (f"{each.accuracy:.1%} ± {100 * each.stderr:.1f} (margin {each.margin:+.3f})" for each in results)
            print(f"{name:24}", *cells, sep="  ", flush=True)
        print("documents:", ", ".join(f"{each.name} {each.n_documents}" for each in results))


def pairs(documents: Path) -> list[tuple[str, str]]:
    """Return the first two sentences of the articles whose second sentence has at least six words."""
    split = (re.split(r"(?<=[a-z)]\.) (?=[A-Z])", text)[:2] for text in pandas.read_parquet(documents)["text"])
    return [(first, second) for first, second in (each for each in split if len(each) == 2) if second.count(" ") >= 5]


def write_tasks(found: list[tuple[str, str]], folder: Path) -> list[str]:
    """Write both tasks in lm-eval's format and return the paths of their YAML files."""
    rng = random.Random(0)
    following, last = [], []
    for i, (first, second) in enumerate(found):
        others = [other for j, (_, other) in enumerate(found) if j != i]
        choices = rng.sample(others, N_CHOICES - 1)
        answer = rng.randrange(N_CHOICES)
        following.append({"text": first, "choices": [*choices[:answer], second, *choices[answer:]], "answer": answer})
        start, _, word = second.rstrip(".").rpartition(" ")
        last.append({"text": f"{first} {start}", "word": word})
    choice = {"doc_to_choice": "choices", "doc_to_target": "answer", "output_type": "multiple_choice"}
    word = {"doc_to_target": " {{word}}", "output_type": "loglikelihood"}
    return [
        write_task(folder, "next_sentence", following, {**choice, "metric_list": metrics("acc", "acc_norm")}),
        write_task(folder, "last_word", last, {**word, "metric_list": metrics("acc")}),
    ]


def write_task(folder: Path, name: str, rows: list[dict], settings: dict) -> str:
    """Write the documents and the YAML of a task; return the path of the YAML."""
    data, path = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    path.write_text(yaml.safe_dump(task | {"test_split": "test", "doc_to_text": "text"} | settings))
    return str(path)


def metrics(*names: str) -> list[dict]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


if __name__ == "__main__":
    main()
