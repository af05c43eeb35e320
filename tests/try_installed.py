"""Run the whole pipeline with an installed package; `make dist` runs this script in a fresh environment.

    python tests/try_installed.py FOLDER

makes a teacher with random weights in FOLDER, runs `litgpt whittle` (search, extract, repair, distill, report), exports
the student, and compares its logits with those of transformers.
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
    run("--help")
    run(
        *("whittle", teacher, "--target=100k±20%", f"--out_dir={folder / 'out'}", "--data=HFText"),
        *(f"--data.path={train}", f"--data.val_path={validation}"),
        *("--search.iterations=4", "--search.eval.max_iters=1"),
        *("--extract.repair.tokens=4096", "--distill.train.max_tokens=2048", "--distill.train.max_seq_length=64"),
        "--distill.train.global_batch_size=8",
    )
    (student,) = folder.glob("out/**/final/lit_model.pth")
    print(run("export", student.parent, f"--out_dir={folder / 'hf'}"))


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
