"""Compare choices of the method on one teacher: a set of students, several seeds, a table and a plot per question.

    python benchmarks/evidence.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet

Questions (all by default, or `--questions starts …`):

starts      initial weights: random, plain cut, repaired cut; with and without the teacher
baseline    tokens until distilled students match random weights trained on --baseline_tokens
repairs     closed-form repair alone, and with the LM head fitted to the teacher's predictions; with and without the
            teacher
strategies  evolution, random search, or importance alone, before and after training
fitness     candidates scored as plain cuts, or repaired from moments; an eighth and a third of the teacher's size
spaces      the four search spaces, a small and a middle student
evaluations number of evaluations that a layer-wise and a uniform space need, up to the default number
losses      weights, temperature and kind of the distillation loss
rates       learning rate of a repaired student, a third and two thirds of the teacher's size
codecs      live teacher, or cached predictions: all, the top 64, or 12 samples per token
teachers    cut from one teacher and distil from another: one of another shape (--other), and one of another domain,
            which is the teacher after a million tokens of C++ (the headers that come with PyTorch)

All students train on the same number of tokens, by default with the teacher's full predictions from a cache, and are
repaired in closed form only, except in the questions about repairs. With --llama, a Llama-shaped teacher is first
trained on the same text and replaces the given one, which becomes the other teacher. Finished results are kept, so an
interrupted run resumes; a student that two questions share is trained once. Tables, pictures and their figures (CSV) go
to `out/evidence/TEACHER`, or to --report; seeds that are already in a question's CSV are not run again.
"""

import argparse
import copy
import csv
import hashlib
import inspect
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from repair import train_llama
from students import Data, cached, litgpt, search, train_settings, validate

from litgpt_whittle import SubNet, load_model, n_params
from litgpt_whittle.batches import connect, validation_batches
from litgpt_whittle.commands.search import setup as search_command
from litgpt_whittle.figures.style import (
    COLORS,
    new_figure,
    save_figure,
)
from litgpt_whittle.results import SearchResult, TrainingResult, tokens_to_reach

Curve = list[tuple[int, float]]
"""Tokens and validation losses of training, in order"""

REPAIRED = "--fitness=repaired_perplexity"
"""Flag to score candidates after a repair; without it they are scored as plain cuts"""
DEFAULT_ITERATIONS = inspect.signature(search_command).parameters["iterations"].default
"""Default number of evaluations of a search"""
CALIBRATION = 16_384
BATCH = 8
VALIDATION = 24
"""Batches per validation"""


@dataclass(frozen=True)
class Student:
    """Settings to make and train a student."""

    found: Path
    """YAML file of the sub-network"""
    repaired: bool = True
    head_passes: int = 0
    """Passes of the repair that fit the LM head"""
    flags: tuple[str, ...] = ("--distill.alpha=0.2", "--distill.beta=0.8", "--distill.temperature=0.9")
    """Training flags; by default the paper's"""
    codec: str | None = "full"
    """Codec of the cached teacher predictions; None runs the live teacher"""
    teacher: Path | None = None
    """Teacher to distil from; by default the bench's teacher"""
    source: Path | None = None
    """Checkpoint to cut the student from; by default the bench's teacher"""
    tokens: int | None = None
    """Training tokens; by default the bench's"""
    n_validations: int = 3
    """Number of validations after the one before training"""


@dataclass
class Bench:
    """A teacher with its text, and everything made from them."""

    data: Data
    out_dir: Path
    tokens: int
    iterations: int
    seeds: list[int]
    other: Path | None = None
    baseline_tokens: int = 3_000_000

    @cached_property
    def teacher_loss(self) -> float:
        """Return the teacher's loss on the students' validation batches."""
        module, length = self.data.module(), self.data.config.block_size
        connect(module, self.data.teacher, BATCH, length)
        return validate(load_model(self.data.teacher), validation_batches(module, length, VALIDATION))

    def found(self, share: float, seed: int, *flags: str, iterations: int | None = None) -> Path:
        """Return a search's best sub-network of a given share of the teacher's size."""
        n = iterations or self.iterations
        name = "-".join(["search", f"{share:g}", str(n), str(seed), *(f.lstrip("-").split(".")[-1] for f in flags)])
        folder = self.out_dir / name.replace("=", "-").replace("/", "_")
        settings = (f"--seed={seed}", "--eval.max_iters=2", *flags)
        size = int(n_params(self.data.config, SubNet.full(self.data.config)) * share)
        search(self.data, folder, n, *settings, size=size)
        return SearchResult(folder).best_path

    def importance(self) -> Path:
        """Return the file of the teacher's importance scores."""
        folder = self.out_dir / "rank"
        if not (folder / "importance.pt").is_file():
            litgpt("rank", self.data.teacher, *self.data.flags(16), f"--out_dir={folder}", "--overwrite=true")
        return folder

    def of_another_domain(self, tokens: int = 1_000_000) -> Path:
        """Return the teacher after further training on other text."""
        folder, text = self.out_dir / "another-domain", self.out_dir / "headers.jsonl"
        if not (folder / "final/lit_model.pth").is_file():
            headers = sorted((Path(torch.__file__).parent / "include").rglob("*.h"))
            random.Random(0).shuffle(headers)
            texts = [path.read_text(errors="ignore") for path in headers[:2000]]
            text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            data = copy.copy(self.data)
            data.train = text  # validation still uses the original text
            path = train_settings(folder.with_suffix(".yaml"), data, tokens, 1e-3, 10_000)
            start = f"--initial_checkpoint_dir={self.data.teacher}"
            litgpt("distill", f"--config={path}", start, f"--out_dir={folder}", f"--eval.max_iters={VALIDATION}")
        return folder / "final"

    def cut(self, student: Student, seed: int) -> Path:
        """Return the checkpoint that a student starts from; each seed calibrates on different text."""
        name = student.found.parent.name + (f"-repaired-{seed}" if student.repaired else "-plain")
        name += f"-head-{student.head_passes}" if student.head_passes else ""
        name += "" if student.source is None else "-other"
        folder = self.out_dir / "starts" / name
        if not (folder / "lit_model.pth").is_file():
            repair = []
            if student.repaired:
                repair = [f"--repair.tokens={CALIBRATION}", f"--repair.head_passes={student.head_passes}"]
                repair += self.data.flags(16, seed)
            litgpt("extract", student.source or self.data.teacher, student.found, f"--out_dir={folder}", *repair)
        return folder

    def train(self, student: Student, seed: int) -> TrainingResult:
        """Train a student, unless it is already trained."""
        told = {field.name: getattr(student, field.name) for field in fields(student)}
        told = {name: value for name, value in told.items() if value != getattr(Student, name, None)}
        tokens = student.tokens or self.tokens
        told = json.dumps(told | {"seed": seed, "tokens": tokens}, default=str, indent=1)
        folder = self.out_dir / "students" / hashlib.sha256(told.encode()).hexdigest()[:12]
        if not (folder / "final/lit_model.pth").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.with_suffix(".json").write_text(told)
            every = tokens // (BATCH * self.data.config.block_size) // student.n_validations
            path = train_settings(folder.with_suffix(".yaml"), self.data, tokens, 1e-3, every, seed)
            flags = [f"--train.micro_batch_size={BATCH}", f"--train.global_batch_size={BATCH}"]
            flags += ["--train.lr_warmup_steps=10", f"--eval.max_iters={VALIDATION}", *self.taught(student, seed)]
            start = f"--initial_checkpoint_dir={self.cut(student, seed)}"
            litgpt("distill", f"--config={path}", start, f"--out_dir={folder}", *flags, *student.flags)
        return TrainingResult(folder)

    def taught(self, student: Student, seed: int) -> list[str]:
        """Return the flag that names a student's teacher."""
        if ALONE[0] in student.flags:
            return []
        if student.codec is None:
            return [f"--teacher_checkpoint_dir={student.teacher or self.data.teacher}"]
        folder = self.out_dir / f"cache-{student.codec}-{seed}"
        return [f"--teacher_cache={cached(self.data, folder, student.codec, self.tokens, BATCH, seed)}"]


ALONE = ("--distill.beta=0",)
"""Flags of a student without a teacher"""
RANDOM = ("--random_weights=true",)


def starts(bench: Bench, seed: int) -> dict[str, Student]:
    found = bench.found(1 / 3, 1, "--strategy=EvoPress")
    return {
        "random weights": Student(found, False, flags=ALONE + RANDOM),
        "random weights, distilled": Student(found, False, flags=Student.flags + RANDOM),
        "plain cut": Student(found, False, flags=ALONE),
        "plain cut, distilled": Student(found, False),
        "repaired": Student(found, flags=ALONE),
        "repaired, distilled": Student(found),
    }


def baseline(bench: Bench, seed: int) -> dict[str, Student]:
    found = bench.found(1 / 3, seed, "--strategy=EvoPress", REPAIRED, iterations=2 * bench.iterations)
    n, taught = bench.baseline_tokens, {"tokens": bench.baseline_tokens // 3, "n_validations": 16, "codec": None}
    return {
        "random weights": Student(found, False, flags=ALONE + RANDOM, tokens=n, n_validations=16),
        "plain cut, distilled": Student(found, False, **taught),
        "repaired, distilled": Student(found, head_passes=1, **taught),
    }


def repairs(bench: Bench, seed: int) -> dict[str, Student]:
    found = bench.found(1 / 3, 1, "--strategy=EvoPress")
    return {
        "closed form": Student(found, flags=ALONE),
        "closed form, distilled": Student(found),
        "and the head": Student(found, head_passes=1, flags=ALONE),
        "and the head, distilled": Student(found, head_passes=1),
    }


def strategies(bench: Bench, seed: int) -> dict[str, Student]:
    # more evaluations than in the other questions, because evolution starts like random search
    n, names = 2 * bench.iterations, ("EvoPress", "Evolution", "RandomSearch")
    found = {name: bench.found(1 / 3, seed, f"--strategy={name}", REPAIRED, iterations=n) for name in names}
    # Minitron's procedure: the most important units, the same in all layers, with the best of a few sizes
    ranked = ("--order=importance", f"--importance={bench.importance()}", "--space=coarse_uniform")
    few = bench.found(1 / 3, seed, "--strategy=RandomSearch", *ranked, iterations=5)
    plain = {name: Student(path) for name, path in found.items()} | {"importance alone (Minitron)": Student(few)}
    return plain | {
        "importance alone, plain cut": Student(few, False),
        "EvoPress, plain cut": Student(found["EvoPress"], False),
    }


def fitness(bench: Bench, seed: int) -> dict[str, Student]:
    students = {}
    for size, share in (("an eighth", 1 / 8), ("a third", 1 / 3)):
        for name, flags in (("perplexity", ()), ("repaired_perplexity", (REPAIRED,))):
            students[f"{size}, {name}"] = Student(bench.found(share, seed, "--strategy=EvoPress", *flags))
    return students


def spaces(bench: Bench, seed: int) -> dict[str, Student]:
    students = {}
    for size, share in (("small", 1 / 3), ("middle", 2 / 3)):
        for space in ("coarse_uniform", "coarse_layerwise", "fine_uniform", "fine_layerwise"):
            # the other questions' space is not named, so that its search is shared with them
            flags = (REPAIRED,) if space == "coarse_layerwise" else (REPAIRED, f"--space={space}")
            students[f"{size}, {space}"] = Student(bench.found(share, seed, "--strategy=EvoPress", *flags))
    return students


def evaluations(bench: Bench, seed: int) -> dict[str, Student]:
    return {f"{space}, {n} evaluations": Student(found) for (space, n), found in searched(bench, seed).items()}


def searched(bench: Bench, seed: int) -> dict[tuple[str, int], Path]:
    """Return the results of short and long searches, by space and number of evaluations."""
    found = {}
    for space in ("fine_uniform", "coarse_layerwise"):
        flags = ("--strategy=Evolution", REPAIRED)  # the defaults of `search`, as is the larger n
        flags += () if space == "coarse_layerwise" else (f"--space={space}",)
        for n in (2 * bench.iterations, DEFAULT_ITERATIONS):
            found[space, n] = bench.found(1 / 3, seed, *flags, iterations=n)
    return found


def losses(bench: Bench, seed: int) -> dict[str, Student]:
    found = bench.found(1 / 3, 1, "--strategy=EvoPress")

    def distilled(*flags: str, **more: str | None) -> Student:
        return Student(found, flags=(*Student.flags, *(f"--distill.{flag}" for flag in flags)), **more)

    return {
        "the paper's (α 0.2, β 0.8, T 0.9)": Student(found),
        "α 0, β 1": distilled("alpha=0", "beta=1"),
        "α 0.5, β 0.5": distilled("alpha=0.5", "beta=0.5"),
        "no teacher": Student(found, flags=ALONE),
        "T 0.5": distilled("temperature=0.5"),
        "T 2": distilled("temperature=2"),
        "T 4": distilled("temperature=4"),
        "reverse_kl": distilled("loss=reverse_kl"),
        "jensen_shannon": distilled("loss=jensen_shannon"),
        "hidden states too": distilled("hidden.weight=1", codec=None),
        "α 0, β 1, T 2, hidden states too": distilled(
            "alpha=0", "beta=1", "temperature=2", "hidden.weight=1", codec=None
        ),
    }


def rates(bench: Bench, seed: int) -> dict[str, Student]:
    students = {}
    for size, share in (("a third", 1 / 3), ("two thirds", 2 / 3)):
        found = bench.found(share, seed, "--strategy=EvoPress", REPAIRED)
        students[f"{size}, 1e-3"] = Student(found)  # decays to a tenth of the rate, like the others
        for rate in (3e-4, 1e-4, 3e-5):
            settings = {"lr": rate, "weight_decay": 0.1, "betas": [0.9, 0.95]}
            optimizer = json.dumps({"class_path": "torch.optim.AdamW", "init_args": settings})
            flags = (f"--optimizer={optimizer}", f"--train.min_lr={rate / 10:g}")
            students[f"{size}, {rate:g}"] = Student(found, flags=(*Student.flags, *flags))
    return students


def codecs(bench: Bench, seed: int) -> dict[str, Student]:
    found = bench.found(1 / 3, 1, "--strategy=EvoPress")
    cached = {name: Student(found, codec=name) for name in ("full", "top_k", "sampled")}
    return {"no teacher": Student(found, flags=ALONE), "live": Student(found, codec=None), **cached}


def teachers(bench: Bench, seed: int) -> dict[str, Student]:
    found, abroad = bench.found(1 / 3, 1, "--strategy=EvoPress"), bench.of_another_domain()
    students = {
        "cut from and distilled by one": Student(found),
        "distilled by one of another domain": Student(found, codec=None, teacher=abroad),
        "cut from one of another domain": Student(found, source=abroad),
        "both of another domain": Student(found, codec=None, teacher=abroad, source=abroad),
    }
    if bench.other is not None:
        students["distilled by one of another shape"] = Student(found, codec=None, teacher=bench.other)
    return students


QUESTIONS: dict[str, Callable[[Bench, int], dict[str, Student]]] = {
    "starts": starts,
    "baseline": baseline,
    "repairs": repairs,
    "strategies": strategies,
    "fitness": fitness,
    "spaces": spaces,
    "evaluations": evaluations,
    "losses": losses,
    "rates": rates,
    "codecs": codecs,
    "teachers": teachers,
}


class Runs:
    """Validation losses of a question's students, stored as CSV; seeds that are present are not run again."""

    def __init__(self, path: Path, tokens: int) -> None:
        self.path, self.curves = path, {}
        if path.is_file():
            with path.open() as file:
                for row in csv.DictReader(file):
                    curve = self.curves.setdefault(row["student"], {}).setdefault(int(row["seed"]), [])
                    curve.append((int(row["tokens"]), float(row["val_loss"])))
        ends = {curve[-1][0] for by_seed in self.curves.values() for curve in by_seed.values()}
        if ends and tokens not in ends:
            sys.exit(f"{path} has students of {max(ends):,} tokens, not {tokens:,}; move it or change the tokens")

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for by_seed in self.curves.values() for seed in by_seed})

    def add(self, seed: int, curves: dict[str, Curve]) -> None:
        """Add all students of a seed; a seed is stored either completely or not at all."""
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            rows = [(label, seed, *point) for label, curve in curves.items() for point in curve]
            writer.writerows([("student", "seed", "tokens", "val_loss"), *rows] if is_new else rows)
        for label, curve in curves.items():
            self.curves.setdefault(label, {})[seed] = curve

    def column(self, label: str, point: int) -> list[float]:
        """Return a student's losses at one of its validations, by seed."""
        return [self.curves[label][seed][point][1] for seed in self.seeds]


def table(runs: Runs) -> str:
    """Return a Markdown table of perplexities with means and standard deviations over the seeds."""
    # the others' tokens are relative to a student of random weights, if there is one
    baseline = runs.curves.get("random weights")
    more = " tokens to the random one's end |" if baseline else ""
    lines = [f"| student | before training | after |{more}", "| --- | --- | --- |" + " --- |" * bool(baseline)]
    for label, by_seed in runs.curves.items():
        row = f"| {label} | {_spread(runs.column(label, 0))} | {_spread(runs.column(label, -1))} |"
        if baseline:
            reached = [tokens_to_reach(by_seed[seed], baseline[seed][-1][1]) for seed in runs.seeds]
            row += " " + ", ".join("never" if tokens is None else f"{tokens:,}" for tokens in reached) + " |"
        lines.append(row)
    return "\n".join(lines)


def _spread(losses: list[float]) -> str:
    perplexities = [math.exp(loss) for loss in losses]
    mean = f"{statistics.mean(perplexities):.2f}"
    return f"{mean} ± {statistics.stdev(perplexities):.2f}" if len(losses) > 1 else mean


def plot(question: str, runs: Runs, taught: float, path: Path) -> None:
    """Plot validation loss over tokens, mean and range over seeds; colours pair a student with and without teacher."""
    from matplotlib import colormaps
    from matplotlib.ticker import EngFormatter

    figure, [[axes]] = new_figure((9, 5.5))
    kinds = list(dict.fromkeys(label.removesuffix(", distilled") for label in runs.curves))
    colors = colormaps["tab10" if len(kinds) <= 10 else "tab20"].colors
    for label, by_seed in runs.curves.items():
        kind = label.removesuffix(", distilled")
        style = "--" if label == kind and f"{kind}, distilled" in runs.curves else "-"
        color = colors[kinds.index(kind)]
        tokens = [n for n, _ in by_seed[runs.seeds[0]]]
        columns = [runs.column(label, point) for point in range(len(tokens))]
        means = [statistics.mean(column) for column in columns]
        axes.plot(tokens, means, style, marker="o", ms=3, color=color, label=f"{label}: {means[-1]:.3f}")
        axes.fill_between(tokens, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, lw=0)
    axes.axhline(taught, color="black", linestyle=":", linewidth=1, label=f"teacher: {taught:.3f}")
    low = min(min(runs.column(label, -1)) for label in runs.curves)
    axes.set(xlabel="tokens of training", ylabel="validation loss, nats per token")
    axes.set_ylim(top=min(axes.get_ylim()[1], low + 4))
    axes.set_title(f"{question}; seeds: {', '.join(map(str, runs.seeds))}", loc="left")
    if len({curve[-1][0] for by_seed in runs.curves.values() for curve in by_seed.values()}) > 1:
        axes.set_xscale("symlog", linthresh=min(by_seed[runs.seeds[0]][1][0] for by_seed in runs.curves.values()))
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    save_figure(figure, path)


def plot_searches(bench: Bench, seeds: list[int], path: Path) -> None:
    """Plot the best score so far over evaluations, mean and range over seeds, of the longest searches."""
    figure, [[axes]] = new_figure((9, 5))
    curves: dict[str, list[np.ndarray]] = {}
    for seed in seeds:
        for (space, n), found in searched(bench, seed).items():
            if n == DEFAULT_ITERATIONS:
                findings = SearchResult(found.parent).findings
                scores = [evaluation.score(findings.score) for evaluation in findings.evaluations]
                curves.setdefault(space, []).append(np.minimum.accumulate(scores))
    for color, (space, found) in zip(COLORS, curves.items()):
        n = np.arange(1, len(found[0]) + 1)
        axes.plot(n, np.mean(found, 0), color=color, label=space)
        axes.fill_between(n, np.min(found, 0), np.max(found, 0), color=color, alpha=0.15, lw=0)
    axes.set(
        xscale="log", xlim=(20, None), xlabel="evaluations", ylabel="best perplexity so far, repaired from moments"
    )
    axes.set_ylim(top=max(curve[20] for found in curves.values() for curve in found))
    axes.set_title(f"searches for a third of the size; seeds: {', '.join(map(str, seeds))}", loc="left")
    save_figure(figure, path)


def answer(bench: Bench, question: str, report: Path) -> None:
    """Train the students of a question that are not recorded yet, and write its table and picture."""
    tokens = bench.baseline_tokens if question == "baseline" else bench.tokens
    tokens -= tokens % (BATCH * bench.data.config.block_size)  # a whole number of steps
    runs = Runs(report / f"{question}.csv", tokens)
    new = [seed for seed in bench.seeds if seed not in runs.seeds]
    for seed in new:
        curves = {}
        for label, student in QUESTIONS[question](bench, seed).items():
            curves[label] = bench.train(student, seed).curve
            before, after = math.exp(curves[label][0][1]), math.exp(curves[label][-1][1])
            print(f"{question}, seed {seed}: {label}: {before:.2f} before, {after:.2f} after", flush=True)
        runs.add(seed, curves)
    if not runs.curves:
        return
    about = f"{tokens:,} tokens of training; seeds {', '.join(map(str, runs.seeds))}; teacher's perplexity "
    text = f"{about}{math.exp(bench.teacher_loss):.2f}.\n\n{table(runs)}\n"
    (report / f"{question}.md").write_text(text)
    plot(question, runs, bench.teacher_loss, report / f"{question}.png")
    if question == "evaluations" and new:
        plot_searches(bench, runs.seeds, report / "searches.png")
    print(f"\n{question}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Data.add_arguments(parser)
    parser.add_argument("--questions", nargs="*", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--tokens", type=int, default=163_840, help="training tokens of each student")
    parser.add_argument("--baseline_tokens", type=int, default=3_000_000, help="tokens of `baseline`'s random weights")
    parser.add_argument("--iterations", type=int, default=60, help="evaluations of each search")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--llama", action="store_true", help="train a Llama-shaped teacher and use that")
    parser.add_argument("--llama_tokens", type=int, default=4_000_000)
    parser.add_argument("--other", type=Path, help="another teacher with the same tokenizer")
    parser.add_argument("--report", type=Path, help="folder for tables and pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Data(args)
    if args.llama:
        args.other = args.other or args.teacher
        data = train_llama(data, args.llama_tokens)
    out_dir = Path("out/evidence") / ("llama" if args.llama else args.teacher.name)
    report = args.report or out_dir
    for folder in (out_dir, report):
        folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(data, out_dir, args.tokens, args.iterations, args.seeds, args.other, args.baseline_tokens)
    for question in args.questions:
        answer(bench, question, report)


if __name__ == "__main__":
    main()
