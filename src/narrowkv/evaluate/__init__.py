"""Measuring a recipe on a model."""

from narrowkv.evaluate.quality import Quality, measure
from narrowkv.evaluate.windows import cut_windows

__all__ = ["Quality", "cut_windows", "measure"]
