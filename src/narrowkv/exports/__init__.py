"""Scales for engines that store keys and values with nothing but scales: measured, checked, and written as they read them."""

from narrowkv.exports.clipping import fitted_ranges
from narrowkv.exports.ranges import Ranges, observe_ranges
from narrowkv.exports.rounding import Rounding, divergence, measure_rounding, require_bearable
from narrowkv.exports.static_scales import StaticQuantization

__all__ = [
    "Ranges",
    "Rounding",
    "StaticQuantization",
    "divergence",
    "fitted_ranges",
    "measure_rounding",
    "observe_ranges",
    "require_bearable",
]
