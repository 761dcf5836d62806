"""Measuring a recipe on a model."""

from narrowkv.evaluate.quality import Quality, cut_windows, measure

__all__ = ["Quality", "cut_windows", "measure"]
