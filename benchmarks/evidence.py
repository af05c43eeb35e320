"""The questions of the method, answered on a teacher: each a set of students, several seeds, one table, one plot.

    python benchmarks/evidence.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet

Questions (all by default, or `--questions starts …`):

starts      what a student begins with: random weights, the plain cut, the repaired cut; with and without the teacher
strategies  evolution, random search, or importance alone, before and after training
fitness     scored as cut, or as repaired from moments, before and after training
spaces      the four search spaces, a small and a middle student
losses      weights, temperature and kind of the distillation loss
teachers    another teacher for the distillation than the one the student was cut from (with --other)

All students train on equally many tokens. What is finished is kept, so that an interrupted run goes on; all figures are
written to a table and a picture in `out/evidence/TEACHER`.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from students import Data, litgpt, search, train_settings

from litgpt_whittle import SubNet, n_params
from litgpt_whittle.results import SearchResult, TrainingResult

CALIBRATION = 16_384


@dataclass(frozen=True)
class Student:
    """How one student is made and trained."""

    found: Path
    """The sub-network's YAML"""
    repaired: bool = True
    flags: tuple[str, ...] = ("--distill.alpha=0.2", "--distill.beta=0.8", "--distill.temperature=0.9")
    """Of its training; the paper's by default"""
    cut: float | None = None
    """What the search measured"""
    teacher: Path | None = None
    """Who distills, where that is not the one it was cut from"""


@dataclass
class Bench:
    """A teacher with its text, and what was made of it."""

    data: Data
    out_dir: Path
    tokens: int
    iterations: int
    seeds: list[int]
    other: Path | None = None

    def found(self, share: float, seed: int, *flags: str) -> tuple[Path, float]:
        """A search's best sub-network of a share of the teacher, with its score."""
        name = "-".join(["search", f"{share:g}", str(seed), *(f.lstrip("-").split(".")[-1] for f in flags)])
        folder = self.out_dir / name.replace("=", "-").replace("/", "_")
        settings = (f"--seed={seed}", "--eval.max_iters=2", *flags)
        size = int(n_params(self.data.config, SubNet.full(self.data.config)) * share)
        search(self.data, folder, self.iterations, *settings, size=size)
        result = SearchResult(folder)
        return result.best_path, result.best.score(result.findings.score)

    def importance(self) -> Path:
        """The teacher's ranking."""
        folder = self.out_dir / "rank"
        if not (folder / "importance.pt").is_file():
            litgpt("rank", self.data.teacher, *self.data.flags(16), f"--out_dir={folder}", "--overwrite=true")
        return folder / "importance.pt"

    def train(self, question: str, label: str, seed: int, student: Student) -> TrainingResult:
        """Trains a student, if that is not done yet."""
        folder = self.out_dir / question / f"{label.replace(' ', '_').replace('/', '_')}-{seed}"
        trained, start = folder / "trained", folder / "start"
        if not (trained / "final/lit_model.pth").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if not (start / "lit_model.pth").is_file():
                repair = [f"--repair.tokens={CALIBRATION}", *self.data.flags(16, seed)] if student.repaired else []
                litgpt("extract", self.data.teacher, student.found, f"--out_dir={start}", *repair)
            path = train_settings(folder / "train.yaml", self.data, self.tokens, 1e-3, self.tokens // 4096 // 5, seed)
            settings = yaml.safe_load(path.read_text())
            del settings["distill"]
            settings["eval"]["max_iters"] = 40
            path.write_text(yaml.safe_dump(settings))
            flags = [f"--teacher_checkpoint_dir={student.teacher or self.data.teacher}", *student.flags]
            litgpt("distill", f"--config={path}", f"--initial_checkpoint_dir={start}", f"--out_dir={trained}", *flags)
        result = TrainingResult(trained)
        cut = "" if student.cut is None else f"{student.cut:.1f} as cut, "
        before = math.exp(result.curve[0][1])
        print(f"{question}: {label}, seed {seed}: {cut}{before:.2f} before, {result.perplexity:.2f} after", flush=True)
        return result


def starts(bench: Bench, seed: int) -> dict[str, Student]:
    found, cut = bench.found(1 / 3, 1, "--strategy=EvoPress")
    alone = ("--distill.beta=0",)
    return {
        "random weights": Student(found, False, (*alone, "--random_weights=true")),
        "random weights distilled": Student(found, False, (*Student.flags, "--random_weights=true")),
        "plain cut": Student(found, False, alone, cut),
        "plain cut distilled": Student(found, False, cut=cut),
        "repaired": Student(found, True, alone, cut),
        "repaired and distilled": Student(found, True, cut=cut),
    }


def strategies(bench: Bench, seed: int) -> dict[str, Student]:
    ranked = ("--order=importance", f"--importance={bench.importance()}")
    found = {name: bench.found(1 / 3, seed, f"--strategy={name}") for name in ("EvoPress", "Evolution", "RandomSearch")}
    # Minitron's procedure: the most important units, uniformly, and the best of a few sizes
    few = Bench(bench.data, bench.out_dir, bench.tokens, 5, bench.seeds)
    found["importance alone"] = few.found(1 / 3, seed, "--strategy=RandomSearch", "--space=coarse_uniform", *ranked)
    return {name: Student(path, cut=cut) for name, (path, cut) in found.items()}


def fitness(bench: Bench, seed: int) -> dict[str, Student]:
    students = {}
    for name in ("perplexity", "repaired_perplexity"):
        found, cut = bench.found(1 / 3, seed, f"--fitness={name}", "--strategy=EvoPress")
        students[name] = Student(found, cut=cut)
    return students


def spaces(bench: Bench, seed: int) -> dict[str, Student]:
    students = {}
    for size, share in (("small", 1 / 3), ("middle", 2 / 3)):
        for space in ("coarse_uniform", "coarse_layerwise", "fine_uniform", "fine_layerwise"):
            path, cut = bench.found(share, seed, f"--space={space}", "--strategy=EvoPress")
            students[f"{size} {space}"] = Student(path, cut=cut)
    return students


def losses(bench: Bench, seed: int) -> dict[str, Student]:
    found, cut = bench.found(1 / 3, 1, "--strategy=EvoPress")

    def distilled(*flags: str) -> Student:
        return Student(found, True, (*Student.flags, *(f"--distill.{flag}" for flag in flags)), cut)

    return {
        "paper (0.2, 0.8, T 0.9)": distilled(),
        "alpha 0": distilled("alpha=0", "beta=1"),
        "alpha 0.5": distilled("alpha=0.5", "beta=0.5"),
        "no teacher": distilled("beta=0"),
        "T 0.5": distilled("temperature=0.5"),
        "T 2": distilled("temperature=2"),
        "reverse_kl": distilled("loss=reverse_kl"),
        "jensen_shannon": distilled("loss=jensen_shannon"),
        "hidden states too": distilled("hidden.weight=1"),
    }


def teachers(bench: Bench, seed: int) -> dict[str, Student]:
    if bench.other is None:
        return {}
    found, cut = bench.found(1 / 3, 1, "--strategy=EvoPress")
    return {
        "its own teacher": Student(found, cut=cut),
        "another teacher": Student(found, cut=cut, teacher=bench.other),
    }


QUESTIONS: dict[str, Callable[[Bench, int], dict[str, Student]]] = {
    "starts": starts,
    "strategies": strategies,
    "fitness": fitness,
    "spaces": spaces,
    "losses": losses,
    "teachers": teachers,
}


def table(results: dict[str, list[TrainingResult]]) -> str:
    """Means and standard deviations over the seeds, as Markdown."""
    lines = ["| student | before training | after |", "| --- | --- | --- |"]
    for label, runs in results.items():
        before = [math.exp(run.curve[0][1]) for run in runs]
        lines.append(f"| {label} | {_spread(before)} | {_spread([run.perplexity for run in runs])} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def plot(question: str, results: dict[str, list[TrainingResult]], path: Path) -> None:
    """Mean validation loss over tokens, with the range over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for i, (label, runs) in enumerate(results.items()):
        tokens = [t for t, _ in runs[0].curve]
        columns = [[run.curve[j][1] for run in runs] for j in range(len(tokens))]
        color, style = f"C{i % 10}", "--" if i >= 10 else "-"
        means = [statistics.mean(column) for column in columns]
        axes.plot(tokens, means, style, marker="o", ms=3, color=color, label=f"{label}: {means[-1]:.3f}")
        axes.fill_between(tokens, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, lw=0)
    taught = next((run.teacher_val_loss for runs in results.values() for run in runs if run.teacher_val_loss), None)
    if taught is not None:
        axes.axhline(taught, color="black", linestyle=":", linewidth=1, label=f"teacher: {taught:.3f}")
    low = min(run.val_loss for runs in results.values() for run in runs)
    axes.set(xlabel="tokens of training", ylabel="validation loss, nats per token")
    axes.set_ylim(top=min(axes.get_ylim()[1], low + 3))
    axes.set_title(f"{question}, {len(next(iter(results.values())))} seeds", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)


def answer(bench: Bench, question: str) -> None:
    """Trains all students of a question, and writes its table and picture."""
    results: dict[str, list[Any]] = {}
    for seed in bench.seeds:
        for label, student in QUESTIONS[question](bench, seed).items():
            results.setdefault(label, []).append(bench.train(question, label, seed, student))
    if not results:
        return
    text = table(results)
    (bench.out_dir / f"{question}.md").write_text(text + "\n")
    plot(question, results, bench.out_dir / f"{question}.png")
    print(f"\n{question}, {bench.tokens:,} tokens, seeds {bench.seeds}\n{text}\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Data.add_arguments(parser)
    parser.add_argument("--questions", nargs="*", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--tokens", type=int, default=500_000, help="training tokens of each student")
    parser.add_argument("--iterations", type=int, default=60, help="evaluations of each search")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--other", type=Path, help="another teacher with the same tokenizer")
    parser.add_argument("--name", default=None, help="the folder in out/evidence; by default the teacher's name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Data(args)
    out_dir = Path("out/evidence") / (args.name or data.config.name or "teacher")
    out_dir.mkdir(parents=True, exist_ok=True)
    bench = Bench(data, out_dir, args.tokens, args.iterations, args.seeds, args.other)
    for question in args.questions:
        answer(bench, question)


if __name__ == "__main__":
    main()
