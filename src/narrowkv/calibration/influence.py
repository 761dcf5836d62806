"""How much single tokens weigh in what is learned: no token too much, and a warning where few of them dominate."""

import torch
from torch import Tensor

from narrowkv.calibration.distributed import Group, reduced

CLIP = 0.99  # longer gradients than this part of a sequence has are shortened
FEW = 0.01  # of the tokens, whose share is reported
BINS, PER_OCTAVE = 2048, 4  # of squared norms; the whole range of float32


class Influence:
    """Limits each token's gradient and measures the share of the Fisher information in the strongest tokens.

    The limit is that of the token's own sequence, so what is learned depends neither on the order of sequences nor on who saw
    them, and memory does not grow. count, mass: [bins] float64, tokens and their squared gradients by the size of these.
    """

    def __init__(self) -> None:
        self.count, self.mass = torch.zeros(2, BINS, dtype=torch.float64, device="cpu")

    def limit(self, gradient: Tensor) -> Tensor:
        """Gradients [tokens, kv_heads, head_dim] of one sequence, the longest ones shortened, as float32.

        Those with a norm beyond the 99th percentile get that norm; their whole one is counted.
        """
        squared = squared_norms(gradient)
        self._add(squared.cpu())
        return limited(gradient, squared)

    def _add(self, squared: Tensor) -> None:
        bins = (squared.clamp(min=1e-300).log2() * PER_OCTAVE + BINS / 2).clamp(0, BINS - 1).to(torch.int64)
        self.count.scatter_add_(0, bins, torch.ones_like(squared))
        self.mass.scatter_add_(0, bins, squared)

    def merge(self, group: Group) -> None:
        """Add what the other processes of a group have counted; all of them then have the same."""
        self.count, self.mass = (reduced(part, "SUM", group) for part in (self.count, self.mass))

    def share_of_few(self) -> float:
        """The share of the Fisher information in the strongest hundredth of the tokens, from 0 to 1."""
        count, mass = self.count.flip(0), self.mass.flip(0)
        before = count.cumsum(0) - count
        taken = ((FEW * count.sum() - before) / count.clamp(min=1)).clamp(0, 1)  # of a bin's tokens
        return float((taken * mass).sum() / mass.sum().clamp(min=torch.finfo(torch.float64).tiny))


def squared_norms(gradient: Tensor) -> Tensor:
    """Of each token of gradients [tokens, kv_heads, head_dim]: [tokens] float64."""
    return gradient.double().square().sum((1, 2))


def limited(gradient: Tensor, squared: Tensor) -> Tensor:
    """Gradients [tokens, kv_heads, head_dim] of one sequence, those beyond the 99th percentile of norms shortened, float32.

    squared: their `squared_norms`.
    """
    gradient = gradient.float()
    most = torch.quantile(squared, CLIP) if len(squared) else squared.sum()
    if not most > 0:
        return gradient
    return gradient * (most / squared.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1).sqrt().float()[:, None, None]
