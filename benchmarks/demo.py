"""The whole pipeline on real text: a teacher, the best sub-network of a third of its size, distilled, against scratch.

Everything happens through the command line, as a user would type it; each command is printed before it runs. The text
is the running Python's own standard library, which everyone has.

    python benchmarks/demo.py            # at most 10 minutes on 2 CPU cores
    python benchmarks/demo.py --short    # 2 minutes, to see that all works

A teacher of your own, with the text that it learned from, takes the place of the first step:

    python benchmarks/demo.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet
"""

import argparse
import csv
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "demo"
VOCABULARY = 2048
BATCH = 16

FULL = {"characters": 12_000_000, "teacher": 2_000_000, "student": 500_000, "iterations": 200, "every": 20}
SHORT = {"characters": 2_000_000, "teacher": 300_000, "student": 100_000, "iterations": 24, "every": 5}
"""Characters of text, tokens for the teacher, tokens for each student, candidates, steps between validations."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a small teacher and a short search, in 2 minutes")
    parser.add_argument("--teacher", type=absolute, help="a litgpt checkpoint to use instead of training one")
    parser.add_argument("--train", type=absolute, help="what that teacher was trained on: JSON lines, parquet or text")
    parser.add_argument("--validation", type=absolute, help="and what it was not")
    parser.add_argument("--tokens", type=int, help="tokens for each student")
    args = parser.parse_args()
    size = SHORT if args.short else FULL
    size |= {"student": args.tokens or size["student"]}
    started = time.perf_counter()
    os.chdir(ROOT)  # where the paths in config_hub begin
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "logs").mkdir(parents=True)
    if args.teacher:
        teacher = args.teacher
        data = {"path": str(args.train), "val_path": str(args.validation)}
    else:
        teacher, data = train_teacher(size), {}
    options = [f"--data.{name}={value}" for name, value in data.items()]
    length, n_params = describe(teacher)

    say("2. The best sub-network of about a third of its size")
    search = ["--config=config_hub/search/demo.yaml", *options, f"--iterations={size['iterations']}"]
    litgpt("search", teacher, *search, f"--train.max_seq_length={length}", f"--bin={n_params // 3}±5%")

    say("3. Cut out as an ordinary litgpt checkpoint, and repaired")
    litgpt("extract", teacher, "out/demo/search/best.yaml", "--out_dir=out/demo/cut")
    litgpt("extract", teacher, "out/demo/search/best.yaml", "--config=config_hub/extract/demo.yaml", *options)

    say(f"4. Trained with the teacher's help on {size['student']:,} tokens")
    train = [f"--train.max_tokens={size['student']}", f"--eval.interval={size['every']}"]
    distill = ["--config=config_hub/distill/demo.yaml", f"--teacher_checkpoint_dir={teacher}"]
    litgpt("distill", *distill, *options, *train)

    say("5. For comparison: the same architecture from random weights, by stock litgpt on the same tokens")
    write_baseline_config(teacher, data)
    litgpt("pretrain", "--config=out/demo/baseline.yaml", *train)

    say("6. A few lines by the student, from stock litgpt")
    litgpt("generate", "out/demo/distilled/final", "--prompt=def main(", "--max_new_tokens=60", show=True)

    report(BATCH * length, data)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Everything is in {OUT.relative_to(ROOT)}/")


def absolute(path: str) -> Path:
    return Path(path).resolve()


def train_teacher(size: dict[str, int]) -> Path:
    """A corpus, a tokenizer and a teacher, where there is none."""
    make_corpus(size["characters"])
    train_tokenizer()
    say(f"1. A teacher, trained by stock litgpt on {size['teacher']:,} tokens")
    litgpt("pretrain", "--config=config_hub/pretrain/demo.yaml", f"--train.max_tokens={size['teacher']}")
    return Path("out/demo/pretrained/final")


def describe(teacher: Path) -> tuple[int, int]:
    """A teacher's block size and number of parameters."""
    from litgpt.config import Config

    from litgpt_whittle import SubNet, n_params

    config = Config.from_checkpoint(ROOT / teacher)
    return config.block_size, n_params(config, SubNet.full(config))


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def litgpt(*arguments: str | Path, show: bool = False) -> None:
    """Runs a litgpt command from the root of the project; its output goes to a log."""
    arguments = [str(argument) for argument in arguments]
    print("$ litgpt " + shlex.join(arguments), flush=True)
    log = OUT / "logs" / f"{len(list((OUT / 'logs').iterdir())):02d}-{arguments[0]}.log"
    environment = os.environ | {
        "TORCHDYNAMO_DISABLE": "1",  # compiling costs more than runs of a minute earn back
        "PYTHONWARNINGS": "ignore",
    }
    started = time.perf_counter()
    with open(log, "w") as file:
        program = Path(sys.executable).with_name("litgpt")
        done = subprocess.run([program, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    text = log.read_text()
    if done.returncode:
        sys.exit(f"{text[-3000:]}\nfailed with exit code {done.returncode}; the whole output is in {log}")
    if show:
        print(text.strip())
    print(f"  {time.perf_counter() - started:.0f} s, output in {log.relative_to(ROOT)}", flush=True)


def make_corpus(characters: int) -> None:
    """Python's standard library as JSON lines; every twentieth file, by a hash of its path, is for validation."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in folder.rglob("*.py") if not {"site-packages", "__pycache__"} & set(f.relative_to(folder).parts)]
    digests = {file: hashlib.sha256(str(file.relative_to(folder)).encode()).digest() for file in files}
    (OUT / "data").mkdir()
    total = 0
    with open(OUT / "data/train.jsonl", "w") as train, open(OUT / "data/validation.jsonl", "w") as validation:
        for file in sorted(files, key=digests.get):  # a random order that is the same everywhere
            text = file.read_text(encoding="utf-8", errors="ignore")
            if text.strip() and total < characters:
                total += len(text)
                part = validation if digests[file][-1] % 20 == 0 else train
                part.write(json.dumps({"text": text}) + "\n")
    print(f"{total:,} characters of Python's standard library")


def train_tokenizer() -> None:
    """A byte-level BPE in the files that litgpt and Hugging Face read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    with open(OUT / "data/train.jsonl") as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
    (OUT / "tokenizer").mkdir()
    tokenizer.save(str(OUT / "tokenizer/tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
    }
    (OUT / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))


def write_baseline_config(teacher: Path, data: dict[str, str]) -> None:
    """The distilled student's settings and architecture, as a YAML for `litgpt pretrain`."""
    settings, distill = (
        yaml.safe_load((ROOT / f"config_hub/{command}/demo.yaml").read_text()) for command in ("pretrain", "distill")
    )
    settings["model_config"] = yaml.safe_load((OUT / "student/model_config.yaml").read_text())
    settings["data"]["init_args"] |= data
    # litgpt's CSV logger only writes every log_interval, and loses what came after the last time
    train = distill["train"] | {"log_interval": 1}
    settings |= {"out_dir": "out/demo/baseline", "tokenizer_dir": str(teacher), "train": train}
    (OUT / "baseline.yaml").write_text(yaml.safe_dump(settings))


def report(tokens_per_step: int, data: dict[str, str]) -> None:
    """The table, and the curves of both students as a picture; tokens of the repair count."""
    from litgpt_whittle.results import tokens_to_reach

    rows = [json.loads(line) for line in (OUT / "distilled/metrics.jsonl").read_text().splitlines()]
    teacher = next(row["teacher_val_loss"] for row in rows if "teacher_val_loss" in row)
    repair = yaml.safe_load((OUT / "student/sub_network.yaml").read_text())["provenance"]["repair"]
    distilled = [(repair["tokens"] + row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row]
    baseline = read_csv("baseline", tokens_per_step)
    best = min(loss for _, loss in baseline)
    rows = [
        ("teacher", "", teacher),
        ("sub-network as cut", "", validation_loss("cut", data)),
        ("sub-network repaired", "", distilled[0][1]),
        ("repaired and distilled", tokens_to_reach(distilled, best), min(loss for _, loss in distilled)),
        ("the same from random weights", tokens_to_reach(baseline, best), best),
    ]
    print(f"\n{'':32}{'perplexity':>12}{'tokens to reach the baseline':>32}")
    for name, tokens, loss in rows:
        shown = "never" if tokens is None else f"{tokens:,}" if tokens != "" else ""
        print(f"{name:32}{math.exp(loss):>12.2f}{shown:>32}")
    plot(teacher, distilled, baseline)
    print("\nPictures: out/demo/students.png, out/demo/search/*.png, out/demo/distilled/training.png")


def validation_loss(run: str, data: dict[str, str]) -> float:
    """The loss of a checkpoint on the batches that the training runs are validated on."""
    import torch

    from litgpt_whittle import load_model
    from litgpt_whittle.batches import connect, validation_batches
    from litgpt_whittle.data import HFText

    settings = yaml.safe_load((ROOT / "config_hub/distill/demo.yaml").read_text())
    model, text = load_model(OUT / run), HFText(**(settings["data"]["init_args"] | data))
    connect(text, OUT / run, settings["train"]["micro_batch_size"], model.config.block_size)
    batches = validation_batches(text, model.config.block_size, settings["eval"]["max_iters"])
    with torch.inference_mode():
        losses = [torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), t.flatten()) for ids, t in batches]
    return float(sum(losses) / len(losses))


def read_csv(run: str, tokens_per_step: int) -> list[tuple[int, float]]:
    """Tokens and validation loss of a stock litgpt run."""
    (path,) = (OUT / run).rglob("metrics.csv")
    with open(path) as file:
        rows = [(int(row["step"]), row["val_loss"]) for row in csv.DictReader(file) if row.get("val_loss")]
    return [((step + 1) * tokens_per_step, float(loss)) for step, loss in rows]


def plot(teacher: float, distilled: list[tuple[int, float]], baseline: list[tuple[int, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for points, label, color in (
        (baseline, "random weights", "tab:gray"),
        (distilled, "sub-network of the teacher, repaired and distilled", "tab:blue"),
    ):
        axes.plot([t / 1000 for t, _ in points], [math.exp(v) for _, v in points], "o-", ms=3, label=label, color=color)
    axes.axhline(math.exp(teacher), linestyle="--", color="tab:green", label="teacher")
    axes.set(yscale="log", xlabel="thousand tokens of training", ylabel="validation perplexity")
    axes.set_title("Two students of the same size")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(OUT / "students.png", dpi=130)


if __name__ == "__main__":
    main()
