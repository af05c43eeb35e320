"""Distill a plain cut and its repaired counterpart for long, and count the tokens that each of them needs.

    python benchmarks/real/long_distillation.py --teacher CHECKPOINT_DIR --text wikipedia TRAIN VALIDATION \
        --text wikitext TRAIN VALIDATION --bos false

Both are trained on the first text and scored on all validation texts. The tokens of the repair count. An interrupted
run resumes.
"""

import json

from matplotlib.ticker import EngFormatter
from repair import DISTILL, LENGTH, Bench, parser
from students import litgpt

from litgpt_whittle.figures.style import COLORS, GRAY, new_figure, save_figure

BATCH = 4
"""Windows per step, all in one micro-batch"""
LABELS = {"cut": "plain cut", "repaired": "repaired and refined"}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, nargs=2, default=(488, 163), metavar=("CUT", "REPAIRED"))
    options.add_argument("--rates", type=float, nargs=2, default=(8e-4, 5e-4), metavar=("CUT", "REPAIRED"))
    options.set_defaults(students=["neurons"])
    args = options.parse_args()
    bench = Bench(args)
    text = next(iter(bench.texts))
    for student in args.students:
        bench.cut(student)
        rows = [
            row
            for start, steps, rate in zip(LABELS, args.steps, args.rates)
            for row in run(bench, student, text, start, steps, rate)
        ]
        show(bench, student, text, rows)


def run(bench: Bench, student: str, text: str, start: str, steps: int, rate: float) -> list[dict]:
    """Train a student and return its losses: on its own text while it is trained, and on all texts in the end."""
    folder = bench.args.out / f"{student}-{text}-{start}-then-{steps * BATCH * LENGTH}"
    sub_network = bench.args.out / f"{student}.yaml"
    if start == "cut":
        source, read = f"--sub_network={sub_network}", 0
    else:
        repaired, read = bench.args.out / f"{student}-{text}-{bench.args.tokens}-repaired", bench.args.tokens
        repair = [f"--repair.tokens={read}", f"--repair.refine_passes={bench.args.passes:g}", *bench.flags(text)]
        if not (repaired / "lit_model.pth").is_file():
            print(litgpt("extract", bench.teacher, sub_network, *repair, f"--out_dir={repaired}")[-700:], flush=True)
        source = f"--initial_checkpoint_dir={repaired}"
    if not (folder / "final").is_dir():
        train = {
            "max_tokens": steps * BATCH * LENGTH,
            "global_batch_size": BATCH,
            "lr_warmup_steps": steps // 10,
            "save_interval": steps // 8,
            "log_interval": 4,
        }
        litgpt(
            *("distill", source, f"--teacher_checkpoint_dir={bench.teacher}", f"--out_dir={folder}", "--resume=auto"),
            *(*DISTILL, "--precision=bf16-mixed", *(f"--train.{name}={value}" for name, value in train.items())),
            *(f"--optimizer.init_args.lr={rate}", f"--eval.interval={steps // 8}"),
            f"--eval.max_iters={bench.args.validation_tokens // (BATCH * LENGTH)}",
            *bench.flags(text, micro_batch=BATCH),
        )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = {row["tokens"]: row["val_loss"] for row in rows if "val_loss" in row}  # a resumed run repeats rows
    found = [{"start": start, "tokens": read + tokens, "nll": {text: loss}} for tokens, loss in sorted(curve.items())]
    last = folder.with_name(f"{folder.name}.json")
    if not last.is_file():
        last.write_text(json.dumps(bench.score(folder / "final")))
    nll, kl = json.loads(last.read_text())
    return [*found[:-1], {"start": start, "tokens": read + steps * BATCH * LENGTH, "nll": nll, "kl": kl}]


def show(bench: Bench, student: str, text: str, rows: list[dict]) -> None:
    """Print the losses and plot those on the students' own text over the tokens that were read."""
    teacher = bench.teacher_nll()
    print("teacher: " + ", ".join(f"{name} {nll:.3f}" for name, nll in teacher.items()))
    figure, [[axes]] = new_figure((7.5, 4.8))
    for color, (start, label) in zip(COLORS, LABELS.items()):
        own = [row for row in rows if row["start"] == start]
        for row in own:
            print(f"{label:22}{row['tokens']:>10,} ", *(f"{name} {nll:.3f}" for name, nll in row["nll"].items()))
        print(f"{'':22} KL to the teacher: ", *(f"{name} {kl:.3f}" for name, kl in own[-1]["kl"].items()))
        axes.plot([row["tokens"] for row in own], [row["nll"][text] for row in own], "o-", color=color, label=label)
    cut, repaired = ([row for row in rows if row["start"] == start] for start in LABELS)
    enough = [row["tokens"] for row in repaired if row["nll"][text] <= cut[-1]["nll"][text]]
    ratio = f"{min(enough) / cut[-1]['tokens']:.2f}" if enough else "not reached"
    print(f"tokens of the repaired student for the plain cut's last loss on {text}, over the plain cut's: {ratio}")
    axes.axhline(teacher[text], color=GRAY, linestyle="--", label="teacher")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="tokens read, those of the repair included", ylabel=f"NLL on {text}, nats per token")
    axes.set_title(f"{bench.teacher.name}, cut in {student}, distilled", loc="left")
    save_figure(figure, bench.args.out / f"{student}-{text}-long.png")


if __name__ == "__main__":
    main()
