from typing import Any

def instruction_sets() -> list[str]:
    """Names of the vector instruction sets of this processor that kernels can use, weakest first."""

def nearest(numbers: Any, points: Any, found: Any, cost: Any, threads: int) -> None:
    """Fill in the nearest point of each code and the squared distance to it; see codec/points.py."""

def moments(numbers: Any, found: Any, sums: Any, threads: int) -> None:
    """Add the moments of all vectors to those of the level that each fell to; see codec/points.py."""
