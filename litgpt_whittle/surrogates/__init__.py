"""Regressors of surrogates; built-in and third-party ones register in the group `litgpt_whittle.surrogates`."""

from litgpt_whittle.surrogates.base import Regressor

__all__ = ["Regressor"]
