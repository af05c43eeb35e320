"""Accuracies of the teacher and of each student on tasks: plain cut, repaired and distilled; each is measured once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from litgpt.model import GPT

from litgpt_whittle.checkpoint import check_checkpoint, load_model, weights_fingerprint
from litgpt_whittle.files import lock_dir, write_text
from litgpt_whittle.pipeline.costs import Cost
from litgpt_whittle.pipeline.stages import Stages
from litgpt_whittle.processes import own_device, release_memory
from litgpt_whittle.results import Checkpoint
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.tasks import TaskResult, TaskSet
from litgpt_whittle.tensors import default_precision, weights_dtype

RESULTS = "tasks.json"
"""Name of the file with the results in the pipeline's folder"""

TEACHER = "teacher"

Load = Callable[[], AbstractContextManager[GPT]]
"""Loads a model for the time of a context"""

Results = dict[str, list[TaskResult]]
"""Results on each task, by the names of the models"""


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    name: str
    weights: Path
    """Checkpoint directory whose weights determine the result"""
    load: Load

    def measure(self, tasks: TaskSet) -> list[TaskResult]:
        """Load the model and return its result on each task."""
        with self.load() as model:
            return tasks.measure(model, f"measuring {self.name}")


def measure_models(out_dir: Path, sources: Mapping[str, Path], teachers: Mapping[str, Path], tasks: TaskSet) -> Results:
    """Measure the teacher and all students of a finished pipeline, except models that are measured already.

    Args:
        out_dir: The pipeline's folder.
        sources: Checkpoint directories that the students were cut from, by the students' names.
        teachers: Checkpoint directories of the teacher (`TEACHER`) and, if there is one, of the corrected teacher.
        tasks: The tasks.
    """
    subjects = [Subject(name, folder, partial(_loaded, folder)) for name, folder in teachers.items()]
    subjects += [subject for name, source in sources.items() for subject in _students(out_dir / name, source)]
    path = out_dir / RESULTS
    found: Results = {}
    with lock_dir(out_dir):
        stored = json.loads(path.read_text()) if path.is_file() else {}
        for subject in subjects:
            key = f"{subject.name}, {weights_fingerprint(subject.weights)}, {tasks.fingerprint}, {default_precision()}"
            if key not in stored:
                stored[key] = [asdict(result) for result in subject.measure(tasks)]
                write_text(path, json.dumps(stored, indent=1))
                release_memory()
            found[subject.name] = [TaskResult(**result) for result in stored[key]]
    return found


def task_table(found: Results) -> list[list[str]]:
    """Return the accuracies as a table, headings first; students' with the retained share of the teacher's."""
    names = [result.name for result in found[TEACHER]]
    rows = [["accuracy", *names, *(["mean"] if len(names) > 1 else [])]]
    teacher = [result.accuracy for result in found[TEACHER]]
    for name, results in found.items():
        cells = [f"{result.accuracy:.1%} ± {100 * result.stderr:.1f}" for result in results]
        own = [result.accuracy for result in results]
        if len(own) > 1:
            cells.append(f"{mean(own):.1%}")
        if name != TEACHER:
            cells = [cell + _retained(a, b) for cell, a, b in zip(cells, [*own, mean(own)], [*teacher, mean(teacher)])]
        rows.append([name, *cells])
    return rows


def task_cost(links: Sequence[Stages], tasks: TaskSet) -> Cost:
    """Return the cost of measuring the teacher and all students, given the links of a `Chain`."""
    first, n = links[0], tasks.n_input_tokens
    students = [link.student_flops(name) for link in links for name in link.request.bins]
    n_each = 2 + bool(first.extract.args.repair) + first.request.has_baseline
    n_teachers = 1 + (first.request.uncorrected is not None)
    forward = n_teachers * first.teacher_flops + n_each * sum(students)
    weights = first.teacher_bytes(weights_dtype(default_precision()))
    return Cost("tasks", n * (n_teachers + n_each * len(students)), n * forward, weights=weights)


def _retained(own: float, teacher: float) -> str:
    return f" ({own / teacher:.0%})" if teacher else ""


def _students(folder: Path, source: Path) -> list[Subject]:
    """Return the models of one student that exist in its folder."""
    start, distilled, baseline = (folder / name for name in ("start", "distilled/final", "baseline/final"))
    found: list[tuple[str, Path, Load]] = [
        ("plain cut", start, partial(_plain_cut, source, start / "sub_network.yaml"))
    ]
    if "repair" in Checkpoint(start).origin:
        found.append(("repaired", start, partial(_loaded, start)))
    found += [("distilled", distilled, partial(_loaded, distilled))]
    found += [("from random weights", baseline, partial(_loaded, baseline))]
    return [Subject(f"{folder.name} {title}", path, load) for title, path, load in found if path.is_dir()]


def _loaded(folder: Path) -> AbstractContextManager[GPT]:
    return nullcontext(load_model(folder, dtype=weights_dtype(default_precision()), device=own_device()))


@contextmanager
def _plain_cut(teacher_dir: Path, sub_network: Path) -> Iterator[GPT]:
    """Yield the teacher running as a sub-network."""
    subnet = SubNet.load(sub_network, check_checkpoint(teacher_dir))
    dtype = weights_dtype(default_precision())
    with load_model(teacher_dir, "SuperGPT", dtype=dtype, device=own_device()).running(subnet, True) as model:
        yield model
