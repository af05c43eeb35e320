"""Test training by two processes: the losses equal those of one, and a run resumes with any number of processes."""

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from litgpt.args import EvalArgs
from test_train import TokenData, checkpoint, predict, rows, run, train_args

from litgpt_whittle.checkpoint import load_model
from litgpt_whittle.distillation.args import DistillArgs

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_train import TokenData, checkpoint, predict, rows, run, train_args
from litgpt.args import EvalArgs
from litgpt_whittle.distillation.args import DistillArgs
from litgpt_whittle.errors import UserError
torch.set_num_threads(1)
try:
    run(Path({out!r}), **{settings})
except UserError as error:
    sys.exit(f"error: {{error}}")
"""


class Code(str):
    """Source code as a settings value."""

    __repr__ = str.__str__


def two_processes(out: Path, **settings) -> tuple[int, str]:
    """Run `litgpt distill` with two processes; return its exit code and output."""
    script = out.parent / f"{out.name}.py"
    settings = {name: Code(f"Path({str(v)!r})") if isinstance(v, Path) else v for name, v in settings.items()}
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(out), settings={"devices": 2} | settings))
    done = forked.run(script, n=2)
    return done.returncode, done.stdout + done.stderr


KEYS = ("loss", "ce", "distill", "val_loss", "teacher_val_loss")
DATA = TokenData(n_train=20)  # two and a half steps per epoch
ARGS = {
    "train": "train_args(micro_batch_size=2, save_interval=2)",
    "data": "TokenData(n_train=20)",
    "eval": "EvalArgs(interval=2, max_iters=4)",
}
ARGS = {name: Code(value) for name, value in (ARGS | {"distill": "DistillArgs()"}).items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Return the run of one process with a teacher; the batches of the two processes are half as large."""
    folder = tmp_path_factory.mktemp("one")
    teacher = checkpoint(folder / "teacher", n_embd=48)
    common = {"teacher_checkpoint_dir": teacher, "data": DATA, "distill": DistillArgs()}
    run(folder / "out", train=train_args(), eval=EvalArgs(interval=2, max_iters=2), **common)
    return folder


@pytest.mark.parametrize(
    "strategy, placement",
    [
        ("fsdp", "sharded"),
        pytest.param("ddp", "auto", marks=pytest.mark.slow),
        pytest.param("fsdp", "replicated", marks=pytest.mark.slow),
        pytest.param("ddp", "sharded", marks=pytest.mark.slow),
    ],
)
def test_two_processes_have_the_losses_of_one(one, tmp_path, strategy, placement):
    settings = {"strategy": strategy, "teacher_placement": placement, "teacher_checkpoint_dir": one / "teacher"}
    code, printed = two_processes(tmp_path / "two", **ARGS, **settings)
    assert code == 0, printed
    for key in KEYS:
        expected = [row[key] for row in rows(one / "out", key)]
        assert [row[key] for row in rows(tmp_path / "two", key)] == pytest.approx(expected, abs=1e-5), key
    ours, theirs = (predict(load_model(out / "final").state_dict()) for out in (tmp_path / "two", one / "out"))
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    "first, kind",
    [
        pytest.param(1, "full", marks=pytest.mark.slow),
        pytest.param(2, "full", marks=pytest.mark.slow),
        pytest.param(1, "sharded", marks=pytest.mark.slow),
        (2, "sharded"),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(one, tmp_path, first, kind):
    teacher = {"teacher_checkpoint_dir": one / "teacher"}

    def by_one(out, **more):
        training = train_args(micro_batch_size=2, save_interval=2)
        scores = EvalArgs(interval=2, max_iters=4)
        run(out, train=training, eval=scores, data=DATA, distill=DistillArgs(), **teacher, **more)

    def by_two(out, **more):
        code, printed = two_processes(out, **ARGS, **teacher, **more)
        assert code == 0, printed

    begin, go_on = (by_one, by_two) if first == 1 else (by_two, by_one)
    begin(tmp_path / "first", checkpoint_type=kind)
    files = {path.name for path in (tmp_path / "first/step-00000002").iterdir()}
    assert ("part-00001-of-00002.pth" in files) == (kind == "sharded" and first == 2)
    assert ("lit_model.pth" in files) == (kind == "full")
    go_on(tmp_path / "second", resume=tmp_path / "first/step-00000002")
    expected, found = (rows(tmp_path / name) for name in ("first", "second"))
    assert [row["step"] for row in found] == [3, 4, 5, 6]
    assert [row["epoch"] for row in found] == [row["epoch"] for row in expected[2:]]
    # litgpt's learning rate changes with every micro-batch, so it differs slightly after the next step
    assert found[0]["loss"] == pytest.approx(expected[2]["loss"], abs=1e-5)
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected[2:]], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_cluster_launchers_start_it(one, tmp_path, launcher):
    script = tmp_path / "script.py"
    settings = ARGS | {"devices": 2, "teacher_checkpoint_dir": Code(f"Path({str(one / 'teacher')!r})")}
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(tmp_path / "out"), settings=settings))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if launcher == "torchrun":
        commands = [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]]
        environments = [environment]
    else:
        job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "7"}
        job |= {"SLURM_NODELIST": "localhost", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        commands = [[sys.executable, str(script)]] * 2
        environments = [environment | job | {"SLURM_PROCID": task, "SLURM_LOCALID": task} for task in ("0", "1")]
    processes = [subprocess.Popen(command, env=env) for command, env in zip(commands, environments)]
    assert [process.wait(timeout=300) for process in processes] == [0] * len(processes)
    for key in KEYS:
        expected = [row[key] for row in rows(one / "out", key)]
        assert [row[key] for row in rows(tmp_path / "out", key)] == pytest.approx(expected, abs=1e-5), key
