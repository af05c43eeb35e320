"""Measure how well the default fitness of a search predicts the ranking of students that are really repaired.

Candidates are the simple starts of a bin (neurons, layers, heads, channels, mixtures) and mutations of them. Each is
scored as cut, by `repaired_perplexity`, and after `litgpt extract --repair` with the same calibration text; with
--distill_tokens, also after `litgpt distill` of the repaired student. Finished candidates are kept, so an interrupted
run resumes.

    python benchmarks/real/fitness.py --teacher CHECKPOINT_DIR --train TRAIN --validation VALIDATION --bos false
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from litgpt.config import Config
from scipy.stats import bootstrap, kendalltau

sys.path.insert(0, str(Path(__file__).parents[1]))
from students import litgpt

from litgpt_whittle import load_model
from litgpt_whittle.batches import calibration_windows, validation_batches
from litgpt_whittle.data import HFText
from litgpt_whittle.data.loading import connect
from litgpt_whittle.figures.style import COLORS, new_figure, save_figure
from litgpt_whittle.fitness.perplexity import Perplexity, RepairedPerplexity
from litgpt_whittle.ranking.quick import quick_order
from litgpt_whittle.spaces.args import SpaceArgs
from litgpt_whittle.spaces.bins import Bin
from litgpt_whittle.spaces.sizes import decided
from litgpt_whittle.spaces.space import Space
from litgpt_whittle.spaces.starts import Start, simple_starts
from litgpt_whittle.supergpt import is_tied

LENGTH = 512
N_FITNESS = 8
"""Windows that the fitness scores, as in a search with --eval.max_iters 8"""
N_FINAL = 16
"""Windows that students are scored on, after those of the fitness"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="a litgpt checkpoint")
    parser.add_argument("--train", required=True, help="text for calibration and training")
    parser.add_argument("--validation", required=True, help="text to score on")
    parser.add_argument("--bos", choices=["true", "false"], help="HFText's data.bos; its default follows the tokenizer")
    parser.add_argument("--bin", default="94.7M±5%")
    parser.add_argument("--n", type=int, default=24, help="candidates")
    parser.add_argument("--tokens", type=int, default=16_384, help="calibration tokens of the repair")
    parser.add_argument("--distill_tokens", type=int, default=0, help="training tokens of each repaired student")
    parser.add_argument("--out", type=Path, default=Path("out/real-fitness"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    starts = score(args)
    for i in np.random.default_rng(1).permutation(len(starts)):  # so that an unfinished run is a random part
        train(args, args.out / f"{i:02d}")
    report(args)


def module(args: argparse.Namespace) -> HFText:
    data = HFText(path=args.train, val_path=args.validation, bos={None: None, "true": True, "false": False}[args.bos])
    connect(data, args.teacher, 1, LENGTH)
    return data


def score(args: argparse.Namespace) -> list[Start]:
    """Draw the candidates, and score each as cut and by the fitness."""
    data = module(args)
    batches = validation_batches(data, LENGTH, N_FITNESS)
    model = load_model(args.teacher, "SuperGPT").eval()
    model.max_seq_length = LENGTH
    order = quick_order(model, [batch.input_ids for batch in batches])
    config, tied = Config.from_checkpoint(args.teacher), is_tied(model.state_dict(keep_vars=True))
    space = Space(config, "fine_uniform", Bin.parse(args.bin), tied, decided(SpaceArgs(), config))
    # as in a search by this fitness, candidates do not list their units; the repair chooses them
    starts, rng = simple_starts(space, order, by_units=False)[: args.n], np.random.default_rng(0)
    parents = [start.subnet for start in starts]
    while len(starts) < args.n:
        parent = int(rng.integers(len(parents)))
        starts.append(Start(f"mutation of {starts[parent].origin}", space.mutate(rng, parents[parent], 0.1)))
    missing = [i for i in range(args.n) if not (args.out / f"{i:02d}/scores.json").is_file()]
    if not missing:
        return starts
    cut = Perplexity(model, batches)
    windows = calibration_windows(data, LENGTH, RepairedPerplexity.n_calibration).input_ids
    repaired = RepairedPerplexity(model, batches, calibration=windows)
    for i in missing:
        origin, subnet = starts[i]
        folder = args.out / f"{i:02d}"
        folder.mkdir(exist_ok=True)
        subnet.save(folder / "sub_network.yaml")
        row = {"origin": origin, "parameters": space.n_params(subnet), "as cut": cut(subnet)["nll"]}
        row["fitness"] = repaired(subnet)["nll"]
        write(folder, row)
        print(json.dumps(row), flush=True)
    return starts


def train(args: argparse.Namespace, folder: Path) -> None:
    """Repair a candidate, distill it if asked for, and score both students."""
    row = json.loads((folder / "scores.json").read_text())
    flags = ["--data=HFText", f"--data.path={args.train}", f"--data.val_path={args.validation}"]
    flags += [f"--data.bos={args.bos}"] if args.bos else []
    flags += ["--train.micro_batch_size=1", f"--train.max_seq_length={LENGTH}"]
    student, trained = folder / "repaired", folder / "distilled"
    if "repaired" not in row:
        sub_network = folder / "sub_network.yaml"
        litgpt("extract", args.teacher, sub_network, f"--repair.tokens={args.tokens}", *flags, f"--out_dir={student}")
        write(folder, row := row | {"repaired": final_nll(args, student)})
        print(json.dumps(row), flush=True)
    if args.distill_tokens and "distilled" not in row:
        steps = args.distill_tokens // (4 * LENGTH)
        flags += [f"--initial_checkpoint_dir={student}", f"--teacher_checkpoint_dir={args.teacher}"]
        flags += ["--distill.beta=1", "--distill.alpha=0", "--precision=32-true", "--compile=false"]
        flags += [f"--train.max_tokens={args.distill_tokens}", "--train.global_batch_size=4", "--train.min_lr=0"]
        flags += [f"--train.lr_warmup_steps={max(steps // 10, 1)}", "--eval.max_iters=1"]
        flags += ["--eval.initial_validation=false", "--optimizer.class_path=torch.optim.AdamW"]
        flags += ["--optimizer.init_args.weight_decay=0", "--optimizer.init_args.lr=0.0003"]
        litgpt("distill", *flags, f"--out_dir={trained}")
        write(folder, row := row | {"distilled": final_nll(args, trained / "final")})
        print(json.dumps(row), flush=True)
    for made in (trained, *([student] if args.distill_tokens else [])):
        shutil.rmtree(made, ignore_errors=True)


@torch.no_grad()
def final_nll(args: argparse.Namespace, folder: Path) -> float:
    """Return a student's NLL in nats per token, on windows that the fitness does not read."""
    model = load_model(folder).eval()
    model.max_seq_length = LENGTH
    batches = validation_batches(module(args), LENGTH, N_FITNESS + N_FINAL)[N_FITNESS:]
    losses = [torch.nn.functional.cross_entropy(model(ids)[0].float(), targets[0]) for ids, targets in batches]
    return float(torch.stack(losses).mean())


def write(folder: Path, row: dict) -> None:
    (folder / "scores.json").write_text(json.dumps(row))


def report(args: argparse.Namespace) -> None:
    """Print and plot all finished candidates, with Kendall's τ of the rankings."""
    rows = [json.loads(path.read_text()) for path in sorted(args.out.glob("*/scores.json"))]
    rows = [row for row in rows if "repaired" in row]
    names = ["as cut", "fitness", "repaired"] + ["distilled"] * all("distilled" in row for row in rows)
    for row in sorted(rows, key=lambda row: row[names[-1]]):
        print(f"{row['origin']:58}{row['parameters'] / 1e6:7.1f}M " + "".join(f"{row[n]:9.3f}" for n in names))
    figure, [axes] = new_figure((4.2 * (len(names) - 1), 4), n_columns=len(names) - 1, sharey=False)
    for ax, first, second in zip(axes, ("fitness", "as cut", "fitness"), ("repaired", "repaired", "distilled")):
        x, y = ([row[name] for row in rows] for name in (first, second))
        interval = bootstrap(
            (x, y), lambda a, b: kendalltau(a, b).statistic, paired=True, vectorized=False, random_state=0
        ).confidence_interval
        tau = kendalltau(x, y).statistic
        print(
            f"τ of {first} with {second}: {tau:.2f} ({interval.low:.2f} to {interval.high:.2f}), {len(rows)} students"
        )
        ax.scatter(x, y, s=20, color=COLORS[0])
        ax.set(xlabel=f"NLL, {first}", ylabel=f"NLL, {second}", title=f"Kendall's τ {tau:.2f}")
    save_figure(figure, args.out / "fitness.png")


if __name__ == "__main__":
    main()
