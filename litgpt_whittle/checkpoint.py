"""litgpt checkpoint directories: validation, safe loading without code execution, and atomic saving."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import qkv_reassemble
from litgpt.utils import extend_checkpoint_dir, save_config

from litgpt_whittle.errors import UserError
from litgpt_whittle.files import MappedWeights, file_fingerprint, from_yaml, new_folder, to_yaml, write_text
from litgpt_whittle.huggingface_config import student_hf_config
from litgpt_whittle.licenses import pass_on_license
from litgpt_whittle.model_config import MODEL_CONFIG, read_model_config
from litgpt_whittle.registry import lookup
from litgpt_whittle.sharded_checkpoint import (
    Rows,
    has_parts,
    part_paths,
    read_parts,
)
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import LayerwiseGPT, is_tied, pad, shape_of
from litgpt_whittle.tensors import save_tensors
from litgpt_whittle.tokenizer_files import copy_tokenizer
from litgpt_whittle.windows import vectorize_windows

WEIGHTS = "lit_model.pth"
HF_CONFIG = "config.json"
MODEL_CLASS = "model_class.yaml"
"""File with a checkpoint's model class (entry-point group `litgpt.models`) and further settings of that class.
Stock litgpt ignores the file and loads the directory as a stock checkpoint."""


def has_tokenizer(folder: Path) -> bool:
    """Return whether a checkpoint directory has a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def check_checkpoint(checkpoint_dir: Path) -> Config:
    """Return the config of a checkpoint directory, which is validated without reading its weights.

    Raises:
        UserError: If the directory is missing or is not a litgpt checkpoint, or if one of its configs cannot be read.
    """
    checkpoint_dir = extend_checkpoint_dir(Path(checkpoint_dir))
    if not checkpoint_dir.is_dir():
        raise UserError(f"there is no checkpoint directory {str(checkpoint_dir)!r}; see 'litgpt download list'")
    if not (checkpoint_dir / WEIGHTS).is_file() and not has_parts(checkpoint_dir):
        raise UserError(
            f"{str(checkpoint_dir)!r} is not a litgpt checkpoint, it has no {WEIGHTS}; "
            "make one with 'litgpt download' or 'litgpt convert_to_litgpt'"
        )
    read_hf_config(checkpoint_dir)
    path = checkpoint_dir / MODEL_CONFIG
    if path.is_file():
        return read_model_config(path)
    try:
        return Config.from_checkpoint(checkpoint_dir)  # litgpt recognises some models by the directory's name
    except FileNotFoundError:
        raise UserError(
            f"{str(checkpoint_dir)!r} has no {MODEL_CONFIG}; copy it from where the checkpoint came from"
        ) from None


def read_weights(checkpoint_dir: Path) -> MappedWeights:
    """Memory-map a checkpoint's weights and validate their names and shapes against its config.

    Raises:
        UserError: As in `check_checkpoint`, or if the file is damaged or does not match the config.
    """
    config = check_checkpoint(checkpoint_dir)
    path = extend_checkpoint_dir(Path(checkpoint_dir)) / WEIGHTS
    weights = _open(path) if path.is_file() else _put_together(path.parent, config)
    weights = weights.get("model", weights) if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{str(path)!r} holds no weights; name a checkpoint of a litgpt model")
    weights = _with_current_names(MappedWeights(weights), config)
    with torch.device("meta"):
        expected = GPT(config).state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise UserError(f"{str(path)!r} lacks {name}, which its model_config.yaml requires; use matching files")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{str(path)!r} has {name} of shape {tuple(weights[name].shape)}, its model_config.yaml requires "
                f"{tuple(tensor.shape)}; use matching files"
            )
    if extra := sorted(set(weights) - set(expected)):
        raise UserError(f"{str(path)!r} has {extra[0]}, which its model_config.yaml does not have; use matching files")
    return weights


def weights_fingerprint(checkpoint_dir: Path) -> str:
    """Return a fingerprint of a checkpoint's weights, independent of their path: sixteen hex digits."""
    path = checkpoint_dir / WEIGHTS
    if path.is_file():
        return file_fingerprint(path)
    parts = [file_fingerprint(part) for part in part_paths(checkpoint_dir)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _put_together(checkpoint_dir: Path, config: Config) -> dict[str, torch.Tensor]:
    """Return the weights of a sharded checkpoint in the layout of `lit_model.pth`."""
    rows = read_parts(checkpoint_dir, "weights")
    weights = {name: value[:] if isinstance(value, Rows) else value for name, value in rows.items()}
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])  # a tied head is not stored
    shape = read_model_class(checkpoint_dir).get("shape")
    return weights if shape is None else pad(SubNet.from_dict(config, shape), weights)


def _open(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError:  # not only weights: `litgpt pretrain` saves its dataloader too
            safe = SimpleNamespace(__name__="safe_pickle", Unpickler=_TensorUnpickler)
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=safe)
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, pickle.UnpicklingError):
        raise UserError(f"{str(path)!r} is truncated or damaged; fetch or convert it again") from None


class _Ignored:
    """Placeholder for any unpickled object that is not a tensor or container; none of its code runs."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = append


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler for tensors and containers; replaces everything else by `_Ignored`, so that no code runs."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"),
            ("torch", "Size"),
            ("torch._utils", "_rebuild_parameter"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch.serialization", "_get_layout"),
        }
        is_storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        return super().find_class(module, name) if is_storage or (module, name) in known else _Ignored


def _with_current_names(weights: MappedWeights, config: Config) -> MappedWeights:
    """Rename and reorder the fused attention weights of old litgpt checkpoints, whose rows are ordered by group."""
    for name in [name for name in weights if ".attn.attn." in name]:
        weights[name.replace(".attn.attn.", ".attn.qkv.")] = qkv_reassemble(weights.pop(name), config)
    return weights


def load_model(
    checkpoint_dir: Path,
    model_class: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GPT:
    """Load a litgpt checkpoint.

    Args:
        checkpoint_dir: The directory, or its name under `checkpoints/`.
        model_class: Name of a class in the entry-point group `litgpt.models`; "SuperGPT" loads any stock checkpoint as
            a super-network. Defaults to the class named by the checkpoint, or litgpt's `GPT`.
        dtype: dtype of the weights; by default, the stored one. The rotary cache is fp32.
        device: Device of the weights.

    Returns:
        The model in evaluation mode. If the head and the embedding are equal, they share one tensor.

    Raises:
        UserError: As in `read_weights`, or if the class is unknown or does not match the checkpoint.
    """
    checkpoint_dir = extend_checkpoint_dir(Path(checkpoint_dir))
    weights, config = read_weights(checkpoint_dir), check_checkpoint(checkpoint_dir)
    named = read_model_class(checkpoint_dir)
    name = model_class or named.pop("model_class", None)
    cls = GPT if name is None else lookup("litgpt.models", name)
    if cls is LayerwiseGPT:
        if "shape" not in named:
            raise UserError(
                f"a LayerwiseGPT needs a {MODEL_CLASS} with a shape, {str(checkpoint_dir)!r} has none; extract it "
                "again or leave out model_class"
            )
        model = LayerwiseGPT.from_padded(config, weights, named["shape"])
    else:
        with torch.device("meta"):
            model = vectorize_windows(cls(config))
        model.load_state_dict(weights, assign=True)
    if is_tied(weights):
        model.lm_head.weight = model.transformer.wte.weight
    model.cos = model.sin = torch.empty(0)  # made on the meta device, from which nothing can be moved
    model = model.to(device=device, dtype=dtype).eval()
    model.cos, model.sin = model.rope_cache(device=device)  # positions need fp32 for any dtype of the weights
    return model


def read_model_class(checkpoint_dir: Path) -> dict[str, Any]:
    """Return the content of `model_class.yaml`; empty if there is no such file.

    Raises:
        UserError: If the file is not a YAML mapping.
    """
    path = Path(checkpoint_dir) / MODEL_CLASS
    try:
        content = from_yaml(path.read_text()) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("shape", {}), dict):
        raise UserError(f"{str(path)!r} is not a YAML mapping; remove it to open a stock litgpt model")
    return content


def save_checkpoint(
    out_dir: Path,
    model: Config | SubNet,
    weights: Mapping[str, torch.Tensor] | None,
    tokenizer_dir: Path | None = None,
    sub_network: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    notes: Mapping[str, Mapping[str, Any]] | None = None,
    tied: bool | None = None,
) -> None:
    """Save a checkpoint directory that stock litgpt loads, atomically; replace an existing directory.

    Args:
        out_dir: The directory.
        model: The model's config, or its sub-network if the weights have the true shape of a student. A layer-wise
            student is padded with zeros; its true shape is saved as well, and `load_model` restores it.
        weights: The weights; None for a sharded checkpoint, whose weights are saved separately.
        tokenizer_dir: Directory from which to copy the tokenizer, the license and the Hugging Face config. Sizes in the
            config are changed to the student's.
        sub_network: Content of `sub_network.yaml`.
        extra: Further files of tensors and plain values, by name.
        notes: Further YAML files, by name.
        tied: True if the LM head is tied to the embedding. The matrix is then stored once, and `weights` may lack the
            head. By default inferred from the weights.
    """
    if tied is None and weights is not None:
        tied = is_tied(weights)
    if tied and weights is not None:
        weights = {**weights, "lm_head.weight": weights["transformer.wte.weight"]}
    config = model.config if isinstance(model, SubNet) else model
    layerwise = isinstance(model, SubNet) and not model.is_uniform
    Path(out_dir).parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out_dir) as folder:
        if weights is not None:
            save_tensors(dict(pad(model, weights) if layerwise else weights), folder / WEIGHTS)
        for name, content in (extra or {}).items():
            save_tensors(content, folder / name)
        if tokenizer_dir is not None:
            copy_tokenizer(Path(tokenizer_dir), folder)
            pass_on_license(Path(tokenizer_dir), folder)
            if content := read_hf_config(Path(tokenizer_dir)):
                write_text(folder / HF_CONFIG, json.dumps(_resized(content, model, tied), indent=2))
        save_config(config, folder)
        if layerwise:
            shape = {"model_class": "LayerwiseGPT", "shape": shape_of(model).to_dict()}
            write_text(folder / MODEL_CLASS, to_yaml(shape))
        if sub_network is not None:
            write_text(folder / "sub_network.yaml", to_yaml(sub_network))
        for name, content in (notes or {}).items():
            write_text(folder / name, to_yaml(content))


def _resized(hf_config: dict[str, Any], model: Config | SubNet, tied: bool | None) -> dict[str, Any]:
    """Return a Hugging Face config with a student's sizes."""
    config, layers = (model.config, model.layers) if isinstance(model, SubNet) else (model, None)
    return student_hf_config(hf_config, config, layers, tied)


def read_hf_config(checkpoint_dir: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's Hugging Face config; empty if there is no such file.

    Raises:
        UserError: If the file cannot be read.
    """
    path = checkpoint_dir / HF_CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is not a Hugging Face config in JSON; fetch it again or remove it")
    return content
