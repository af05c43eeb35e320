"""Additional data modules for litgpt."""

from litgpt_whittle.data.hf_text import HFText

__all__ = ["HFText"]
