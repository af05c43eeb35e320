"""The form of a student that a stock class of `transformers` loads: all layers padded to the widest."""

from __future__ import annotations

import dataclasses
from typing import Any

from litgpt.config import Config

from litgpt_whittle.errors import UserError
from litgpt_whittle.families import Family, check_expressible, filled_heads
from litgpt_whittle.hf.model import HFModel, hf_content, hf_weights, with_head
from litgpt_whittle.hf.student import Student
from litgpt_whittle.huggingface_config import expert_width
from litgpt_whittle.index_plan import n_params
from litgpt_whittle.subnet import SubNet
from litgpt_whittle.supergpt import Weights, fill_up


def padded_model(student: Student) -> HFModel:
    """Return a student as a model of its family's class in `transformers`.

    Raises:
        UserError: If the class cannot express the student.
    """
    family = check_expressible(student.config)
    shape = fit_heads(student.config, family)
    config = shape.teacher

    def weights() -> Weights:
        stored = student.weights if config is student.config else fill_up(shape, student.weights)
        return with_head(hf_weights(config, family, stored), stored["lm_head.weight"], student.tied)

    return HFModel(
        content=hf_content(student, config, family),
        weights=weights,
        n_params=n_params(config, SubNet.full(config), student.tied),
        model_class=_auto_class,
        notes=_notes(student, config),
    )


def _auto_class() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _notes(student: Student, config: Config) -> tuple[str, ...]:
    notes = []
    if zero_heads := config.n_head - student.config.n_head:
        notes.append(
            f"Its heads need n_embd / n_head dimensions there: each layer is padded with {zero_heads} zero heads."
        )
    widths = (config.n_embd, expert_width(config))
    if config.mlp_class_name == "LLaMAMoE" and any(width * student.dtype.itemsize % 16 for width in widths):
        notes.append(
            "Open it with experts_implementation='eager': the default needs rows of a multiple of 16 bytes in the "
            "experts' weights."
        )
    return tuple(notes)


def fit_heads(config: Config, family: Family) -> SubNet:
    """Return the model as a sub-network of a larger model whose head size its class in `transformers` permits.

    Some classes fix the head size to `n_embd / n_head`. If the model has fewer heads than that, zero heads are added,
    which do not change the outputs.

    Raises:
        UserError: If zero heads cannot fill the channels.
    """
    n_embd, size, groups = config.n_embd, config.head_size, config.n_query_groups
    if family.free_heads or config.n_head * size == n_embd:
        return SubNet.full(config)
    if (filled := filled_heads(config)) is None:
        raise UserError(
            f"{family.architecture} of transformers has heads of n_embd / n_head dimensions, got n_embd = {n_embd}, "
            f"n_head = {config.n_head} and head_size = {size}; keep n_embd at a multiple of {size} and at most "
            f"n_embd / {size} heads, as --search_space.convertible and --search_space.fixed '[head_size, n_embd]' do"
        )
    wider = dataclasses.replace(config, n_head=n_embd // size, n_query_groups=filled[0])
    return SubNet(wider, n_query_groups=groups, heads_per_group=config.n_head // groups)
