"""What may shrink: the four search spaces, and sub-networks built into a bin."""

from litgpt_whittle.spaces.space import Space

__all__ = ["Space"]
