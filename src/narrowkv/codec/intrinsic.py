"""The intrinsic-value 2-bit codec in NumPy: four levels v_min, v1, v2, v_max for a block of elements.

It is known elsewhere under KIVI's name; KIVI as published is another method (methods/kivi.py). An element takes the level
below it: 00: x < v1; 01: v1 <= x < v2; 10: v2 <= x <= v_max; 11: x > v_max, which stand for v_min, v1, v2 and v_max. Where
v_max is the largest element there is, code 11 is never used. `nearest` repairs both: an element takes the level nearest to it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from narrowkv.errors import ActivationError, RecipeError

BINS = 64


@dataclass(frozen=True)
class IntrinsicValues:
    """The levels of one block, v_min <= v1 <= v2 <= v_max; raises RecipeError where they are not in this order."""

    v1: float
    v2: float
    v_min: float
    v_max: float

    def __post_init__(self) -> None:
        if not self.v_min <= self.v1 <= self.v2 <= self.v_max:
            raise RecipeError(
                f"Intrinsic values must ascend, v_min <= v1 <= v2 <= v_max, but are {self.v_min}, {self.v1}, {self.v2}, "
                f"{self.v_max}."
            )

    @property
    def levels(self) -> NDArray[np.float64]:
        """What the codes 0 to 3 stand for: [4]."""
        return np.array([self.v_min, self.v1, self.v2, self.v_max])

    @classmethod
    def of(
        cls,
        x: ArrayLike,
        how: Literal["frequency", "kmeans"] = "frequency",
        v_min: float | None = None,
        v_max: float | None = None,
    ) -> "IntrinsicValues":
        """Estimate the levels of a block of elements; v_min and v_max are its extremes unless preset.

        how: v1 and v2 are the centers of the two most frequent bins of a histogram of 64 (`frequency`), or of two clusters
        found by k-means to its optimum (`kmeans`). Raises ActivationError where x is empty, NaN or infinite.
        """
        elements = np.asarray(x, dtype=np.float64).ravel()
        if elements.size == 0 or not np.isfinite(elements).all():
            raise ActivationError("A block must have elements that are neither NaN nor infinite.")
        low = float(elements.min()) if v_min is None else v_min
        high = float(elements.max()) if v_max is None else v_max
        if not low < high:
            return cls(low, low, low, low)
        inside = np.sort(elements.clip(low, high))
        if how == "kmeans":
            v1, v2 = _two_means(inside)
        else:
            counts, edges = np.histogram(inside, bins=BINS, range=(low, high))
            first, second = sorted(np.argsort(counts, kind="stable")[-2:])
            v1, v2 = (edges[first] + edges[first + 1]) / 2, (edges[second] + edges[second + 1]) / 2
        return cls(float(v1), float(v2), low, high)


def quantize(x: ArrayLike, v1: float, v2: float, v_min: float, v_max: float, *, nearest: bool = False) -> NDArray[np.uint8]:
    """Codes 0 to 3 of elements of any shape; nearest: by the nearest level instead of the table 00, 01, 10, 11."""
    elements, levels = np.asarray(x, dtype=np.float64), IntrinsicValues(v1, v2, v_min, v_max).levels
    if nearest:
        return np.searchsorted((levels[1:] + levels[:-1]) / 2, elements, side="left").astype(np.uint8)
    return ((elements >= v1).astype(np.uint8) + (elements >= v2) + (elements > v_max)).astype(np.uint8)


def dequantize(codes: ArrayLike, v1: float, v2: float, v_min: float, v_max: float) -> NDArray[np.float64]:
    """What codes stand for, of their shape."""
    found: NDArray[np.float64] = IntrinsicValues(v1, v2, v_min, v_max).levels[np.asarray(codes)]
    return found


def _two_means(ascending: NDArray[np.float64]) -> tuple[float, float]:
    """Means of the two clusters with the least squared error, which are a prefix and the rest of the sorted elements."""
    count = np.arange(1, len(ascending))
    total = ascending.cumsum()
    left, right = total[:-1], total[-1] - total[:-1]
    split = int(np.argmax(left**2 / count + right**2 / (len(ascending) - count)))  # the least error is the most explained
    return float(left[split] / count[split]), float(right[split] / (len(ascending) - count[split]))
