"""The four search spaces, and construction of sub-networks within a range of parameter counts (a bin)."""

from litgpt_whittle.spaces.space import Space

__all__ = ["Space"]
