"""Measure how many tokens a fitness needs to rank candidates: KL to the teacher against perplexity.

Random sub-networks of a third of the teacher's size are scored on every window of the validation text by both measures.
Rankings from a few random windows, drawn many times, are then compared with the ranking from all windows: by Kendall's
τ, and by the perplexity of the top candidate against that of the best. Finished scores are kept, so an interrupted run
resumes.

    python benchmarks/fitness_tokens.py --teacher CHECKPOINT_DIR --train train.parquet --validation validation.parquet
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from litgpt.model import GPT
from rankings import draw
from scipy.stats import kendalltau
from students import Data
from tqdm import tqdm

from litgpt_whittle import SubNet, load_model
from litgpt_whittle.batches import Batch, connect, validation_batches
from litgpt_whittle.distillation.head import TeacherLogits, head_loss, hidden_states
from litgpt_whittle.distillation.objective import Objective
from litgpt_whittle.supergpt import SuperGPT, extract_weights, student_model
from litgpt_whittle.tensors import IGNORE_INDEX

OUT = Path("out/fitness_tokens")
MEASURES = ("perplexity", "KL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Data.add_arguments(parser)
    parser.add_argument("--n", type=int, default=40, help="sub-networks")
    parser.add_argument("--draws", type=int, default=200, help="random draws of windows per number of tokens")
    parser.add_argument("--batches", type=int, default=1000, help="maximum batches of 16 windows, from the whole text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    losses, n_tokens = score(Data(args), args.n, args.batches)
    report(compare(losses, n_tokens, args.draws), losses, n_tokens)


@torch.inference_mode()
def score(data: Data, n: int, n_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of both losses, shape (2, n_subnets, n_windows), and the numbers of tokens, shape (n_windows,)."""
    module, length = data.module(), data.config.block_size
    connect(module, data.teacher, 16, length)
    batches = validation_batches(module, length, 10**9)
    # shuffled, so that the windows scored so far are a sample of the whole text
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()[:n_batches]
    model = load_model(data.teacher, "SuperGPT")
    model.max_seq_length = length
    students = [student_of(model, subnet) for subnet in draw(data, n)]
    losses, n_tokens = [], []
    for i in tqdm(order, "batches"):
        path = OUT / f"{n}-students-batch-{i:03d}.npy"
        if not path.is_file():
            np.save(path, losses_of(model, students, batches[i]))
        losses.append(np.load(path))
        n_tokens.append((batches[i].targets != IGNORE_INDEX).sum(1).numpy())
    return np.concatenate(losses, -1), np.concatenate(n_tokens)


def student_of(model: SuperGPT, subnet: SubNet) -> GPT:
    student = student_model(subnet)
    student.load_state_dict(extract_weights(model, subnet))
    return student.eval()


class Known(TeacherLogits):
    """Precomputed logits, because many students are compared with one teacher."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        return self.logits[start:stop].clone()


def losses_of(model: SuperGPT, students: list[GPT], batch: Batch) -> np.ndarray:
    """Return the losses of all students on every window, summed over its tokens, shape (2, n_students, n_windows)."""
    taught = [Known(row) for row in model(batch.input_ids)]
    sums = np.zeros((2, len(students), len(taught)))
    for s, student in enumerate(students):
        ours = hidden_states(student, batch.input_ids)
        for w, targets in enumerate(batch.targets):
            found = head_loss(ours._replace(hidden=ours.hidden[w]), targets, Objective(0, 1), taught[w])
            sums[:, s, w] = [float(x) * int((targets != IGNORE_INDEX).sum()) for x in (found.ce, found.distill)]
    return sums


def compare(losses: np.ndarray, n_tokens: np.ndarray, n_draws: int) -> dict[int, dict[tuple[str, str], np.ndarray]]:
    """Compare the rankings from random windows with the full ranking, for each number of tokens.

    Returns:
        Kendall's τ by the measure that ranks and the reference measure (both on the same candidates), and, under
        "pick", the relative excess perplexity of the top-ranked candidate over the best one.
    """
    rng = np.random.default_rng(0)
    means = losses.sum(-1) / n_tokens.sum()  # (2, n_subnets)
    found: dict[int, dict[tuple[str, str], np.ndarray]] = {}
    n_windows, n = len(n_tokens), 1024
    while n < n_tokens.sum():
        draws = []
        for _ in range(n_draws):
            order = rng.permutation(n_windows)
            chosen = order[: 1 + int(np.searchsorted(n_tokens[order].cumsum(), n))]
            draws.append(losses[..., chosen].sum(-1) / n_tokens[chosen].sum())
        found[n] = {}
        for i, measure in enumerate(MEASURES):
            for j, reference in enumerate(MEASURES):
                taus = [kendalltau(few[i], means[j]).statistic for few in draws]
                found[n][measure, reference] = np.array(taus)
            picks = [means[0, few[i].argmin()] - means[0].min() for few in draws]
            found[n][measure, "pick"] = np.expm1(picks)
        n *= 2
    return found


def report(found: dict, losses: np.ndarray, n_tokens: np.ndarray) -> None:
    means = losses.sum(-1) / n_tokens.sum()
    nll, kl = means
    print(f"{len(nll)} sub-networks, {n_tokens.sum():,} tokens: NLL {nll.min():.3f} … {nll.max():.3f}, ", end="")
    print(f"KL {kl.min():.3f} … {kl.max():.3f}, tau between the two rankings {kendalltau(nll, kl).statistic:.3f}")
    print("tau with the ranking on all tokens, mean ± standard deviation, and excess perplexity of the pick (mean)")
    columns = [(m, r) for r in MEASURES for m in MEASURES]
    head = "".join(f"{f'{m} → {r}':>26}" for m, r in columns) + "".join(f"{f'{m} pick':>18}" for m in MEASURES)
    print(f"{'tokens':>8}{head}")
    for n, cell in found.items():
        row = "".join(f"{f'{cell[c].mean():.3f} ± {cell[c].std():.3f}':>26}" for c in columns)
        print(f"{n:>8,}{row}" + "".join(f"{cell[m, 'pick'].mean():>18.2%}" for m in MEASURES))
    plot(found)


def plot(found: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, reference in zip(axes, MEASURES):
        for measure, color in zip(MEASURES, ("tab:blue", "tab:orange")):
            taus = np.array([cell[measure, reference] for cell in found.values()])  # (n_sizes, n_draws)
            ax.plot(list(found), taus.mean(1), "o-", markersize=4, color=color, label=f"ranked by {measure}")
            ax.fill_between(list(found), *np.percentile(taus, [10, 90], axis=1), color=color, alpha=0.2, linewidth=0)
        ax.set(xscale="log", xlabel="tokens per candidate", title=f"reference: {reference} on all tokens")
        ax.set_xticks(list(found), [f"{n // 1024}k" for n in found], minor=False)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(loc="lower right")
    axes[0].set_ylabel("Kendall's τ with that ranking\n(mean, and 10 to 90 % of draws)")
    figure.savefig(OUT / "fitness_tokens.png", dpi=120)
    print(f"Picture: {OUT / 'fitness_tokens.png'}")


if __name__ == "__main__":
    main()
