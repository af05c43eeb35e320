"""Compare a repair on a real pretrained model with its cheapest rival: distilling the plain cut on the same tokens.

    python benchmarks/real/repair.py --teacher CHECKPOINT_DIR --text wikipedia TRAIN VALIDATION \
        --text wikitext TRAIN VALIDATION

Every student is scored on all validation texts. Finished runs are not repeated, so the table can be made in parts, for
instance with --students depth --starts repaired.
"""

import argparse
import json
import math
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from students import litgpt

from litgpt_whittle import SubNet, load_model
from litgpt_whittle.batches import validation_batches
from litgpt_whittle.checkpoint import check_checkpoint
from litgpt_whittle.data import HFText
from litgpt_whittle.data.loading import connect
from litgpt_whittle.distillation.head import TeacherLogits, head_loss, hidden_states
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.figures.style import (
    COLORS,
    GRAY,
    new_figure,
    save_figure,
)
from litgpt_whittle.ranking.quick import quick_order

LENGTH = 512
STUDENTS = ("depth", "neurons")
"""Students: the layers before and after a gap; half of the neurons, by activation × column norm"""
DISTILL = ["--distill.beta=1", "--distill.alpha=0", "--compile=false", "--logger_name=csv", "--train.min_lr=0"]
DISTILL += ["--optimizer.class_path=torch.optim.AdamW", "--optimizer.init_args.weight_decay=0"]
"""The rival: KL only, AdamW, a cosine to zero"""


def parser(doc: str) -> argparse.ArgumentParser:
    """Return the options of all benchmarks that repair or distill students of a real model."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="a litgpt checkpoint")
    parser.add_argument("--text", nargs=3, action="append", required=True, metavar=("NAME", "TRAIN", "VALIDATION"))
    parser.add_argument("--students", nargs="*", default=list(STUDENTS), choices=STUDENTS)
    parser.add_argument("--gap", type=int, nargs=2, default=(8, 18), metavar=("FIRST", "NEXT"), help="dropped layers")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--validation_tokens", type=int, default=8192, help="tokens of each validation text")
    parser.add_argument("--passes", type=float, default=1.0, help="passes of the refinement")
    parser.add_argument("--bos", choices=["true", "false"], help="HFText's data.bos; its default follows the tokenizer")
    parser.add_argument("--nll_only", action="store_true", help="do not measure the KL divergence, in half of the time")
    parser.add_argument("--out", type=Path, default=Path("out/real"))
    return parser


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--on", nargs="*", help="texts to calibrate on and to train on, by name; all by default")
    options.add_argument("--starts", nargs="*", default=["cut", "repaired", "refined", "distilled"])
    options.add_argument("--batch", type=int, default=4, help="windows per step of the distillations")
    options.add_argument("--lrs", type=float, nargs="*", default=[3e-4, 8e-4], help="of the distillations")
    args = options.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args)
    for student in args.students:
        bench.cut(student)
        for text in args.on or bench.texts:
            for start in args.starts:
                bench.run(student, text, start)
    bench.table()


class Bench:
    """The runs, their results in a JSON file each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.teacher = args, args.teacher
        args.out.mkdir(parents=True, exist_ok=True)
        self.texts = {name: (train, validation) for name, train, validation in args.text}

    def run(self, student: str, text: str, start: str) -> None:
        """Make a student and score it."""
        tokens, flags = self.args.tokens, self.flags(text)
        sub_network = self.args.out / f"{student}.yaml"
        repair = ["extract", self.teacher, sub_network, f"--repair.tokens={tokens}", *flags]
        steps = tokens // (self.args.batch * LENGTH)
        distill = ["distill", f"--sub_network={sub_network}", f"--teacher_checkpoint_dir={self.teacher}", *DISTILL]
        distill += [
            f"--train.max_tokens={tokens}",
            f"--train.global_batch_size={self.args.batch}",
            f"--train.lr_warmup_steps={steps // 10}",
        ]
        distill += ["--precision=32-true", "--eval.max_iters=1", "--eval.initial_validation=false", *flags]
        commands = {
            "cut": {"cut": ["extract", self.teacher, sub_network]},
            "repaired": {"repaired": repair},
            "refined": {f"refined-{self.args.passes:g}": [*repair, f"--repair.refine_passes={self.args.passes:g}"]},
            "distilled": {f"distilled-{lr:g}": [*distill, f"--optimizer.init_args.lr={lr}"] for lr in self.args.lrs},
        }[start]
        for name, command in commands.items():
            folder = self.args.out / f"{student}-{text}-{tokens}-{name}"
            result_path = folder.with_name(f"{folder.name}.json")  # a learning rate has a dot
            if result_path.is_file():
                continue
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            print(litgpt(*command, f"--out_dir={folder}")[-700:], flush=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            nll, kl = self.score(folder / "final" if start == "distilled" else folder)
            result = {"student": student, "text": text, "tokens": tokens, "start": name, "cpu": seconds}
            result |= {"nll": nll, "kl": kl}
            result_path.write_text(json.dumps(result))
            print(json.dumps(result), flush=True)

    def flags(self, text: str, micro_batch: int = 1) -> list[str]:
        train, validation = self.texts[text]
        flags = ["--data=HFText", f"--data.path={train}", f"--data.val_path={validation}"]
        flags += [f"--data.bos={self.args.bos}"] if self.args.bos else []
        return [*flags, f"--train.micro_batch_size={micro_batch}", f"--train.max_seq_length={LENGTH}"]

    def cut(self, student: str) -> None:
        """Write the sub-network of a student."""
        config, path = check_checkpoint(self.teacher), self.args.out / f"{student}.yaml"
        if path.is_file():
            return
        if student == "depth":
            first, after = self.args.gap
            SubNet(config, n_layer=f"0-{first - 1},{after}-{config.n_layer - 1}").save(path)
            return
        model = load_model(self.teacher)
        order = quick_order(model, [ids for ids, _ in self.validation(next(iter(self.texts)))])
        n = config.intermediate_size // 2
        best = [order.best("intermediate_size", layer, n) for layer in range(config.n_layer)]
        SubNet(config, intermediate_size=best).save(path)

    def validation(self, text: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the first validation tokens and their next tokens, shape (1, LENGTH) each."""
        train, validation = self.texts[text]
        bos = {None: None, "true": True, "false": False}[self.args.bos]
        data = HFText(path=train, val_path=validation, bos=bos)
        connect(data, self.teacher, 1, LENGTH)
        batches = validation_batches(data, LENGTH, self.args.validation_tokens // LENGTH)
        return [(batch.input_ids, batch.targets) for batch in batches]

    @torch.no_grad()
    def score(self, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
        """Return the negative log-likelihood and KL(teacher ‖ student) in nats per token, by text; 0 if unmeasured."""
        models = [load_model(path).eval() for path in (folder, self.teacher)[: 1 if self.args.nll_only else 2]]
        objective = Objective(alpha=1.0, beta=0.0) if self.args.nll_only else Objective(alpha=0.0, beta=1.0)
        found = []
        for model in models:
            model.max_seq_length = LENGTH
        for text in self.texts:
            losses = []
            for ids, targets in self.validation(text):
                ours, *theirs = (hidden_states(model, ids) for model in models)
                both = head_loss(ours, targets, objective, *map(TeacherLogits, theirs))
                losses.append((float(both.ce), float(both.distill)))
            found.append([sum(part) / len(part) for part in zip(*losses)])
        return tuple(dict(zip(self.texts, values)) for values in zip(*found))

    def teacher_nll(self) -> dict[str, float]:
        """Return the teacher's negative log-likelihood by text."""
        path = self.args.out / "teacher.json"
        if not path.is_file():
            path.write_text(json.dumps(self.score(self.teacher)[0]))
        return json.loads(path.read_text())

    def table(self) -> None:
        """Print all results so far."""
        teacher = self.teacher_nll()
        print("teacher: " + ", ".join(f"{name} {nll:.3f}" for name, nll in teacher.items()))
        found = [json.loads(file.read_text()) for file in self.args.out.glob("*-*.json")]
        cpu = {}
        for row in found:
            if row["start"].startswith("distilled"):
                key = row["student"], row["text"], row["tokens"]
                cpu[key] = min(cpu.get(key, math.inf), row["cpu"])
        print(
            f"{'student':9}{'text':11}{'tokens':>8}  {'start':20}",
            *(f"{name:>10}" for name in teacher),
            "   CPU s  ratio",
        )
        for student, text in sorted({(row["student"], row["text"]) for row in found}):
            rows = [row for row in found if (row["student"], row["text"]) == (student, text) and row["start"] != "cut"]
            plot(self.teacher.name, student, text, rows, teacher[text], self.args.out / f"{student}-{text}.png")
        for row in sorted(found, key=lambda row: (row["student"], row["text"], row["tokens"], row["start"])):
            rival = cpu.get((row["student"], row["text"], row["tokens"]))
            ratio = f"{row['cpu'] / rival:7.2f}" if rival else ""
            scores = " ".join(f"{row['nll'][name]:10.3f}" for name in teacher)
            print(
                f"{row['student']:9}{row['text']:11}{row['tokens']:>8}  {row['start']:20}",
                scores,
                f"{row['cpu']:8.0f}",
                ratio,
            )


def plot(title: str, student: str, text: str, rows: list[dict], teacher: float, path: Path) -> None:
    """Plot the loss on the students' own text over their CPU time."""
    figure, [[axes]] = new_figure((7.5, 4.8))
    kinds = {"repaired": "repaired", "refined": "repaired and refined", "distilled": "plain cut, distilled"}
    for color, (kind, label) in zip(COLORS, kinds.items()):
        own = [row for row in rows if row["start"].startswith(kind)]
        if own:
            axes.plot([r["cpu"] for r in own], [r["nll"][text] for r in own], "o", color=color, label=label)
        for row in own:
            place = row["cpu"], row["nll"][text]
            axes.annotate(
                f"{row['tokens']:,} tokens",
                place,
                (6, -15 if kind == "refined" else 6),
                textcoords="offset points",
                color=color,
            )
    axes.axhline(teacher, color=GRAY, linestyle="--", label="teacher")
    axes.set(xlabel="CPU seconds", ylabel=f"NLL on {text}, nats per token")
    axes.set_xlim(0, 1.25 * max(row["cpu"] for row in rows))
    axes.set_title(f"{title}, cut in {student}", loc="left")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
