"""The kinds of stages, in the order of their runs."""

from __future__ import annotations

from collections.abc import Sequence

from litgpt_whittle.pipeline.cache_stage import CacheTeacherStage
from litgpt_whittle.pipeline.correct_teacher import CorrectTeacherStage
from litgpt_whittle.pipeline.distill_stage import DistillStage
from litgpt_whittle.pipeline.extract_stage import ExtractStage
from litgpt_whittle.pipeline.rank_stage import RankStage
from litgpt_whittle.pipeline.search_stage import SearchStage
from litgpt_whittle.pipeline.stage import Stage

STAGES: Sequence[type[Stage]] = (
    CorrectTeacherStage,
    RankStage,
    SearchStage,
    CacheTeacherStage,
    ExtractStage,
    DistillStage,
)
"""All kinds of stages in the order of their runs; kinds that run once per student come last"""

STAGE_OF: dict[str, type[Stage]] = {kind.name: kind for kind in STAGES}
"""Kinds by the names of their commands and sections"""
