"""Regressors behind surrogates, found through the entry-point group `litgpt_whittle.surrogates`, ours like anyone's."""

from litgpt_whittle.surrogates.base import Regressor

__all__ = ["Regressor"]
