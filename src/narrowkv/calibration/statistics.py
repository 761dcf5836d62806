"""Streaming statistics: what calibration keeps of keys and values. Memory does not grow with the number of samples."""

import torch
from torch import Tensor

from narrowkv.calibration.distributed import Group, reduced

QUANTILE_BINS = 2048
CODEBOOK_BINS = 4096
TILE_NUMBERS = 2**18  # elements counted at a time, so that intermediate results stay in the processor's cache


def quantile(x: Tensor, fraction: float) -> Tensor:
    """[1]: the smallest number that at least `fraction` of x [n] do not exceed."""
    rank = min(int(fraction * len(x)), len(x) - 1)
    return x.kthvalue(rank + 1).values[None]


def metric_axes(covariance: Tensor, fisher: Tensor) -> Tensor:
    """Axes of a covariance in the metric of the loss, ascending: [kv_heads, head_dim, head_dim], orthogonal.

    covariance, fisher: [kv_heads, head_dim, head_dim] float64.
    """
    mean = fisher.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    values, vectors = torch.linalg.eigh(fisher / mean.clamp(min=torch.finfo(torch.float64).tiny))
    root = vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT
    return torch.linalg.eigh(root @ covariance @ root)[1]


class Quantiles:
    """Histograms of many channels, from which any quantile can be read to within one bin.

    A bin is 2^exponent wide and begins at a multiple of that; the exponent follows from a channel's range, which fits into the
    bins. So the counts depend on the elements alone, not on the order in which they came or on who counted them.
    counts: [channels, bins] int32. exponent, first: [channels] int64, width and index of a channel's first bin.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.exponent = self.first = torch.empty(0, dtype=torch.int64, device="cpu")
        self.smallest = self.largest = torch.empty(0, dtype=torch.float32, device="cpu")  # [channels] float32

    def add(self, x: Tensor) -> None:
        """Count elements: x [samples, channels], any float dtype."""
        if x.shape[0] == 0:
            return
        x = x.float() if x.dtype == torch.float64 else x
        smallest, largest = (part.float() for part in torch.aminmax(x, dim=0))
        if self.counts is None:
            self.counts = torch.zeros(x.shape[1], QUANTILE_BINS, dtype=torch.int32, device=x.device)
            self.smallest, self.largest = smallest, largest
            self.exponent, self.first = _grid(smallest, largest)
        self._widen(torch.minimum(self.smallest, smallest), torch.maximum(self.largest, largest))
        step = max(TILE_NUMBERS // len(x), 1)
        for start in range(0, x.shape[1], step):
            stop = min(start + step, x.shape[1])
            self._count(x[:, start:stop], start, stop)

    def merge(self, group: Group) -> None:
        """Add what the other processes of a group have counted; all of them then have the same."""
        assert self.counts is not None
        self._widen(reduced(self.smallest, "MIN", group), reduced(self.largest, "MAX", group))
        self.counts = reduced(self.counts, "SUM", group)

    def _widen(self, smallest: Tensor, largest: Tensor) -> None:
        """Move the counts to the bins of a wider range."""
        assert self.counts is not None
        exponent, first = _grid(smallest, largest)
        moved = ((exponent != self.exponent) | (first != self.first)).nonzero().squeeze(1)
        for channels in moved.split(TILE_NUMBERS // QUANTILE_BINS):
            bins = self.first[channels, None] + torch.arange(QUANTILE_BINS, device=first.device, dtype=torch.int64)
            bins = (bins >> (exponent - self.exponent)[channels, None]) - first[channels, None]
            old = self.counts[channels]  # bins that fall outside the new ones are empty
            self.counts[channels] = torch.zeros_like(old).scatter_add_(1, bins.clamp_(0, QUANTILE_BINS - 1), old)
        self.smallest, self.largest, self.exponent, self.first = smallest, largest, exponent, first

    def _count(self, x: Tensor, start: int, stop: int) -> None:
        assert self.counts is not None
        offset = torch.arange(stop - start, device=x.device, dtype=torch.int64) * QUANTILE_BINS - self.first[start:stop]
        precise = torch.float64 if offset.abs().max() > 2**22 else torch.float32  # in which all of this is integers
        bins = x.to(precise, copy=True).mul_(torch.exp2(-self.exponent[start:stop].to(precise)))
        bins = bins.floor_().add_(offset).to(torch.int64)
        _count_into(self.counts[start:stop].view(-1), bins.view(-1))

    def quantile(self, fraction: float, pooled: bool = False) -> Tensor:
        """The outer edge of the bin in which the quantile `fraction` of each channel lies: [channels] float32.

        Outer, since a frequent number at the end of a channel must not be cut off: interpolating within the bin would.
        pooled: of all channels taken together, [1].
        """
        assert self.counts is not None
        steps = self.first[:, None] + torch.arange(QUANTILE_BINS + 1, device=self.first.device, dtype=torch.int64)
        edges = (steps * torch.exp2(self.exponent[:, None].double())).float()
        edges = edges.clamp(self.smallest[:, None], self.largest[:, None])
        outer, counts = edges[:, :-1] if fraction < 0.5 else edges[:, 1:], self.counts.double()
        if pooled:
            outer, order = outer.flatten().sort()
            outer, counts = outer[None], counts.flatten()[order][None]
        total = counts.cumsum(1)
        bin_index = torch.searchsorted(total, fraction * total[:, -1:]).clamp(max=total.shape[1] - 1)
        return outer.gather(1, bin_index).squeeze(1)


def _grid(smallest: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent of the bins' width and index of the first, [channels] int64 each, for ranges [channels] float32."""
    low, high = smallest.double(), largest.double()
    span = torch.maximum(high - low, torch.maximum(low.abs(), high.abs()) * 2**-20).clamp(min=1e-30)
    exponent = (span / (QUANTILE_BINS - 1)).log2().ceil()
    first = (low * torch.exp2(-exponent)).floor()
    exponent += (high * torch.exp2(-exponent)).floor() - first >= QUANTILE_BINS
    return exponent.to(torch.int64), (low * torch.exp2(-exponent)).floor().to(torch.int64)


class CodebookHistogram:
    """A fine histogram of normalized elements in [-1, 1]: what a codebook is fitted to.

    weight: [bins] float64, sums of the weights. count: [bins] float64, elements seen: for Q-Norm, and where all weights are 0.
    """

    def __init__(self) -> None:
        self.weight, self.count = torch.zeros(2, CODEBOOK_BINS, dtype=torch.float64, device="cpu")

    def add(self, normalized: Tensor, weight: Tensor | None) -> None:
        """Add elements [n] float32 with their weights [n] float32 (None: 1 each); those outside [-1, 1] are left out."""
        last = CODEBOOK_BINS + 1  # bins 0 and `last` take what lies outside
        slope = CODEBOOK_BINS / 2 * (1 - 1e-5)  # the ends of a range are inside, whatever their rounding
        bins = normalized.mul(slope).add_(CODEBOOK_BINS / 2 + 1).clamp_(0, last).to(torch.int64)
        count, mass = torch.zeros(2, last + 1, device=normalized.device, dtype=torch.float32)
        _count_into(count, bins)
        self.count += count[1:last].double().cpu()
        if weight is None:
            mass = count
        else:
            mass.scatter_add_(0, bins, weight)
        self.weight += mass[1:last].double().cpu()

    def merge(self, group: Group) -> None:
        """Add what the other processes of a group have seen; all of them then have the same."""
        self.weight, self.count = (reduced(part, "SUM", group) for part in (self.weight, self.count))

    @property
    def centers(self) -> Tensor:
        """[bins] float64."""
        return (torch.arange(CODEBOOK_BINS, dtype=torch.float64, device="cpu") + 0.5) * (2 / CODEBOOK_BINS) - 1


def _count_into(counts: Tensor, bins: Tensor) -> None:
    """Add 1 to counts [m] for each of bins [n] int64. `torch.bincount` takes several times as long."""
    counts.scatter_add_(0, bins, counts.new_ones(1).expand_as(bins))
