"""Measuring a recipe on a model."""

from narrowkv.evaluate.perplexity import Quality, measure
from narrowkv.evaluate.windows import cut_windows

__all__ = ["Quality", "cut_windows", "measure"]
