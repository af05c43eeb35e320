"""Read tasks with lm-eval: find their definitions, build their requests, and encode them as lm-eval does.

lm-eval and its task definitions load slowly, so they are imported only where a command measures tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from litgpt.tokenizer import Tokenizer

from litgpt_whittle.errors import UserError
from litgpt_whittle.extras import require
from litgpt_whittle.tasks.args import Score, TaskArgs
from litgpt_whittle.tasks.batches import Continuation
from litgpt_whittle.tasks.task_set import Document, Task, TaskSet

FEWSHOT_SEED = 1234
"""lm-eval's default seed of few-shot examples"""

ORDER_SEED = 0
"""Seed of the order of documents"""

MEASURED = ("multiple_choice", "loglikelihood")
"""Output types of lm-eval that are measured"""

_UNLIKELY = -1e4
"""Log-likelihood of all other answers when lm-eval is asked which answers are correct"""


def read_tasks(args: TaskArgs, tokenizer_dir: Path, max_length: int, score: Score = "margin") -> TaskSet:
    """Read tasks, select their documents and tokenise them.

    Args:
        args: The settings; at least one task.
        tokenizer_dir: Directory with the tokenizer's files.
        max_length: Maximum length of a model's input.
        score: Mean over tasks that a search maximises.

    Raises:
        UserError: If lm-eval is not installed, or if a task cannot be read, generates text, has no accuracy, or has
            answers that are empty or too long.
    """
    if not args.names:
        raise UserError("tasks.names must name at least one task; give for example --tasks.names '[hellaswag]'")
    require("lm_eval", "ecosystem", "measuring tasks")
    from lm_eval.tasks import TaskManager

    registered = cache(TaskManager)  # indexes thousands of tasks
    found = [entry for name in args.names for entry in _find(name, registered)]
    if repeated := {name for name, _ in found if [other for other, _ in found].count(name) > 1}:
        raise UserError(f"tasks.names gives the task {min(repeated)!r} twice; name it once")
    reader = _Reader(tokenizer_dir, max_length)
    tasks = [Task(name, reader.documents(name, _selected(name, parts, args))) for name, parts in found]
    return TaskSet(tasks, reader.continuations, max_length, score)


def _find(name: str, registered: Callable[[], Any]) -> list[tuple[str, list[Any]]]:
    """Return the tasks that a name stands for, each with its name and its lm-eval tasks (several for a group)."""
    from lm_eval.tasks import TaskManager

    path = Path(name).expanduser()
    try:
        if path.is_dir():
            manager = TaskManager(include_path=str(path), include_defaults=False)
            if not manager.all_subtasks:
                raise UserError(f"tasks.names: the folder {name!r} has no task of lm-eval; name one with YAML files")
            found = [(own, manager.load([own])["tasks"]) for own in manager.all_subtasks]
        elif path.suffix in (".yaml", ".yml"):
            if not path.is_file():
                raise UserError(f"tasks.names: there is no file {name!r}; correct the path")
            tasks = TaskManager(include_defaults=False).load([str(path)])["tasks"]
            found = [(next(iter(tasks)) if len(tasks) == 1 else path.stem, tasks)]
        else:
            found = [(name, registered().load([name])["tasks"])]
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip("\"'").splitlines()), type(error).__name__)
        raise UserError(f"tasks.names: lm-eval cannot load {name!r}: {reason}; see 'lm-eval ls tasks'") from None
    for task in (task for _, tasks in found for task in tasks.values()):
        _check(task)
    return [(own, [*tasks.values()]) for own, tasks in found]


def _check(task: Any) -> None:
    """Raise UserError if a task is not one that log-likelihoods of answers decide."""
    name, kind, metrics = task.task_name, task.OUTPUT_TYPE, [*task.aggregation()]
    if kind not in MEASURED:
        raise UserError(
            f"tasks.names: {name!r} is a {kind} task, and only {' and '.join(MEASURED)} tasks can be measured; measure "
            "it with 'litgpt evaluate' after the training"
        )
    if not {"acc", "acc_norm"} & set(metrics):
        raise UserError(f"tasks.names: {name!r} must have the metric acc or acc_norm, got {metrics}; choose another")
    if "acc_mutual_info" in metrics:
        raise UserError(f"tasks.names: {name!r} asks for mutual information, which is not supported; choose another")


def _selected(name: str, parts: Sequence[Any], args: TaskArgs) -> list[tuple[Any, list[int]]]:
    """Return the selected documents of each lm-eval task, by their indices.

    All documents of a group share one random order.

    Raises:
        UserError: If `args.skip` leaves no document.
    """
    places = [(i, k) for i, task in enumerate(parts) for k in range(len(task.eval_docs))]
    order = np.random.default_rng(ORDER_SEED).permutation(len(places))
    end = len(places) if args.limit is None else args.skip + args.limit
    chosen = [places[i] for i in order[args.skip : end]]
    if not chosen:
        raise UserError(
            f"tasks.skip must be less than the {len(places)} documents of {name!r}, got {args.skip}; lower it"
        )
    return [(task, sorted(k for part, k in chosen if part == i)) for i, task in enumerate(parts)]


class _Reader:
    """Turns lm-eval's requests into tokens.

    Args:
        tokenizer_dir: Directory with the tokenizer's files.
        max_length: Maximum number of tokens of an answer.
    """

    def __init__(self, tokenizer_dir: Path, max_length: int) -> None:
        self.encode, self.max_length = _encoder(tokenizer_dir), max_length
        self.continuations: list[Continuation] = []

    def documents(self, name: str, selected: Sequence[tuple[Any, list[int]]]) -> list[Document]:
        """Return documents of a task, and add their continuations to `continuations`."""
        found: list[Document] = []
        for task, indices in selected:
            if not indices:
                continue
            task.set_fewshot_seed(FEWSHOT_SEED)
            is_all = len(indices) == len(task.eval_docs)
            task.build_all_requests(samples=None if is_all else indices)
            requests: dict[int, list[Any]] = {}
            for instance in task.instances:
                requests.setdefault(instance.doc_id, []).append(instance)
            found += [self._document(name, task, own) for own in requests.values()]
        return found

    def _document(self, name: str, task: Any, requests: Sequence[Any]) -> Document:
        begin, doc = len(self.continuations), requests[0].doc
        encoded = self.encode(requests)
        lengths = [len(each.tokens) for each in encoded]
        if not 0 < min(lengths) <= max(lengths) <= self.max_length:
            raise UserError(
                f"the answers of the task {name!r} must have 1 to {self.max_length} tokens, got {lengths} for "
                f"{requests[0].args[1]!r}; choose another task, or raise train.max_seq_length"
            )
        self.continuations += encoded
        metric = "acc_norm" if "acc_norm" in task.aggregation() else "acc"
        n_chars = np.array([max(len(request.args[1].strip()), 1) for request in requests])
        if metric == "acc":  # decided by the log-likelihoods of whole answers
            n_chars = np.full(len(requests), n_chars.max())
        continuations = range(begin, len(self.continuations))
        return Document(task, doc, metric, continuations, n_chars, _correct(task, doc, metric, len(requests)))


def _correct(task: Any, doc: Any, metric: str, n: int) -> np.ndarray:
    """Return which of a document's n answers are correct: those that lm-eval accepts if they are the most likely.

    Documents name their answers in many forms, which only the task's own `process_results` knows.
    """
    if task.OUTPUT_TYPE == "loglikelihood" and n == 1:
        return np.array([True])
    guesses = ([(0.0 if i == k else _UNLIKELY, i == k) for i in range(n)] for k in range(n))
    return np.array([task.process_results(doc, guess)[metric] > 0.5 for guess in guesses])


def _encoder(tokenizer_dir: Path) -> Any:
    """Return a function from lm-eval's requests to their continuations, split as by lm-eval's own models.

    The tokenizer is litgpt's, as everywhere: transformers reads some checkpoints' tokenizer files as another class.

    Raises:
        UserError: If litgpt cannot read the tokenizer, or if it has neither a BOS nor an EOS token.
    """
    from lm_eval.api.model import TemplateLM

    try:
        tokenizer = Tokenizer(tokenizer_dir)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"measuring tasks needs the tokenizer in {str(tokenizer_dir)!r}, which litgpt cannot read: {reason}; "
            "copy the teacher's tokenizer files"
        ) from None
    ends = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None]
    if not ends:
        raise UserError(
            f"measuring tasks needs a tokenizer with a BOS or EOS token, and that in {str(tokenizer_dir)!r} has none; "
            "name one in its tokenizer_config.json"
        )

    class Encoder(TemplateLM):
        """Splits and encodes requests as lm-eval does, without a model."""

        eot_token_id = ends[-1]
        prefix_token_id = ends[0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string, bos=add_special_tokens).tolist()

        def _loglikelihood_tokens(self, requests: Sequence[tuple], **_: Any) -> Any:
            return [Continuation(context, tokens) for _, context, tokens in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

    encoder = Encoder()
    return lambda requests: encoder.loglikelihood(requests, disable_tqdm=True)
