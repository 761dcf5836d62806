"""Saturation: how many elements lie far beyond what codes learned offline can stand for."""

from torch import Tensor


class Saturation:
    """Counts of elements as codes see them; of tokens that are skipped they are seen, and never out of range."""

    def __init__(self) -> None:
        self.out_of_range = 0
        self.seen = 0

    @property
    def fraction(self) -> float:
        """The part of the elements seen that are far out."""
        return self.out_of_range / self.seen if self.seen else 0.0

    def count(self, out_of_range: int, seen: int) -> None:
        """Count elements that an encoder has looked at."""
        self.out_of_range += out_of_range
        self.seen += seen

    def observe(self, out_of_range: Tensor, skip: Tensor | None) -> None:
        """The same of each element: [batch, kv_heads, tokens, any] bool. skip: [batch, tokens] bool."""
        counted = out_of_range if skip is None else out_of_range & ~skip[:, None, :, None]
        self.count(int(counted.sum()), out_of_range.numel())
