"""Convert Gemma 3 270M from GGUF to litgpt and transformers; see `inputs.py`.

Using the weights means to accept the Gemma Terms of Use, https://ai.google.dev/gemma/terms, a copy of which is written
beside them.
"""

import json
import shutil
from pathlib import Path

import torch
from litgpt.config import configs, name_to_config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL, USER_DEFINED = 3, 4
"""Kinds of tokens in a GGUF file"""


def make(file: Path, out_dir: Path) -> None:
    """Write both checkpoints."""
    from transformers import AutoModelForCausalLM

    hf, litgpt = out_dir / "hf-gemma-3-270m", out_dir / "google" / "gemma-3-270m"
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.save_pretrained(hf)
    write_tokenizer(file, hf)
    for terms in file.parent.glob("*/data/GEMMA_TERMS.html"):
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
