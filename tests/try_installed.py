"""Run the commands of an installed package; `make dist` runs this script in a fresh environment.

    python tests/try_installed.py FOLDER

makes a teacher with random weights in FOLDER, searches, cuts out the best sub-network, repairs, distills and exports
it, and compares its logits with those of transformers.
"""

import os
import subprocess
import sys
from pathlib import Path

from checkpoints import write_random_model
from litgpt import Config
from texts import VOCABULARY, documents, write_jsonl, write_tokenizer

import litgpt_whittle


def main(folder: Path) -> None:
    package = Path(litgpt_whittle.__file__).parent
    if "site-packages" not in package.parts:
        sys.exit(f"litgpt_whittle must be an installed package, but it was imported from {package}")
    config = Config.from_name("pythia-14m", n_layer=4, n_embd=64, n_head=4, padded_vocab_size=VOCABULARY)
    teacher = write_tokenizer(write_random_model(folder / "teacher", config))
    train, validation = (write_jsonl(folder / f"{i}.jsonl", documents(200, seed=i)) for i in range(2))
    data = ("--data=HFText", f"--data.path={train}", f"--data.val_path={validation}", "--train.max_seq_length=64")
    found, start, student = folder / "search", folder / "start", folder / "student"
    run("search", teacher, "--bin=100k±20%", "--iterations=4", "--eval.max_iters=1", *data, f"--out_dir={found}")
    run("extract", teacher, found / "best.yaml", "--repair.tokens=4096", *data, f"--out_dir={start}")
    run(
        *("distill", f"--initial_checkpoint_dir={start}", f"--teacher_checkpoint_dir={teacher}", *data),
        *("--train.max_tokens=2048", "--train.global_batch_size=8", "--logger_name=csv", f"--out_dir={student}"),
    )
    print(run("export", student / "final", f"--out_dir={folder / 'hf'}"))


def run(*arguments: str | Path) -> str:
    """Run the environment's litgpt outside of the source tree and return its output."""
    litgpt, environment = Path(sys.executable).with_name("litgpt"), os.environ | {"OMP_NUM_THREADS": "1"}
    command = [str(litgpt), *map(str, arguments)]
    done = subprocess.run(
        command, cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\n{' '.join(command)} failed with exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
