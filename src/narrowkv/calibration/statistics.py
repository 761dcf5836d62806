"""Streaming statistics: what calibration keeps of keys and values. Memory does not grow with the number of samples."""

import torch
from torch import Tensor

QUANTILE_BINS = 1024
CODEBOOK_BINS = 4096
TILE_NUMBERS = 2**18  # numbers counted at a time, so that intermediate results stay in the processor's cache


class Quantiles:
    """Histograms of many channels, from which any quantile can be read to within one bin.

    counts: [channels, bins]. A histogram starts with the range of the first numbers; where later ones fall outside, its
    bins double in width and neighbours merge, so a bin is a thousandth to a few hundredths of the channel's range.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None  # [channels, bins] float32
        self.low = self.width = self.smallest = self.largest = torch.empty(0)  # [channels] float32

    def add(self, x: Tensor) -> None:
        """Count numbers: x [samples, channels], any float dtype."""
        if x.shape[0] == 0:
            return
        smallest, largest = (part.float() for part in torch.aminmax(x, dim=0))
        if self.counts is None:
            self.counts = torch.zeros(x.shape[1], QUANTILE_BINS, device=x.device)
            self.smallest, self.largest, self.low = smallest, largest, smallest.clone()
            self.width = (largest - smallest).clamp_(min=1e-12).mul_(1 + 1e-6)
        self.smallest, self.largest = torch.minimum(self.smallest, smallest), torch.maximum(self.largest, largest)
        self._widen()
        step = max(TILE_NUMBERS // len(x), 1)
        for start in range(0, x.shape[1], step):
            stop = min(start + step, x.shape[1])
            self._count(x[:, start:stop], start, stop)

    def _widen(self) -> None:
        assert self.counts is not None
        for upwards in (True, False):
            while True:
                outside = self.largest > self.low + self.width if upwards else self.smallest < self.low
                if not outside.any():
                    break
                merged = self.counts[outside].unflatten(1, (-1, 2)).sum(2)
                empty = torch.zeros_like(merged)
                self.counts[outside] = torch.cat([merged, empty] if upwards else [empty, merged], dim=1)
                if not upwards:
                    self.low[outside] -= self.width[outside]
                self.width[outside] *= 2

    def _count(self, x: Tensor, start: int, stop: int) -> None:
        assert self.counts is not None
        per_unit = QUANTILE_BINS / self.width[start:stop]
        bins = torch.addcmul(-self.low[start:stop] * per_unit, x.float(), per_unit)
        bins = bins.clamp_(0, QUANTILE_BINS - 1).to(torch.int64)
        bins += torch.arange(stop - start, device=x.device) * QUANTILE_BINS
        _count_into(self.counts[start:stop].view(-1), bins.view(-1))

    def quantile(self, fraction: float, pooled: bool = False) -> Tensor:
        """The outer edge of the bin in which the quantile `fraction` of each channel lies: [channels] float32.

        Outer, since a frequent number at the end of a channel must not be cut off: interpolating within the bin would.
        pooled: of all channels taken together, [1].
        """
        assert self.counts is not None
        steps = torch.arange(QUANTILE_BINS + 1, device=self.low.device) / QUANTILE_BINS
        edges = self.low[:, None] + self.width[:, None] * steps
        edges = edges.clamp(self.smallest[:, None], self.largest[:, None])
        outer, counts = edges[:, :-1] if fraction < 0.5 else edges[:, 1:], self.counts.double()
        if pooled:
            outer, order = outer.flatten().sort()
            outer, counts = outer[None], counts.flatten()[order][None]
        total = counts.cumsum(1)
        place = torch.searchsorted(total, fraction * total[:, -1:]).clamp(max=total.shape[1] - 1)
        return outer.gather(1, place).squeeze(1)


class CodebookHistogram:
    """A fine histogram of normalised numbers in [-1, 1]: what a codebook is fitted to.

    weight: [bins] float64, sums of the weights. count: [bins] float64, numbers seen: for Q-Norm, and where all weights are 0.
    """

    def __init__(self) -> None:
        self.weight, self.count = torch.zeros(2, CODEBOOK_BINS, dtype=torch.float64)

    def add(self, normalised: Tensor, weight: Tensor | None) -> None:
        """Add numbers [n] float32 with their weights [n] float32 (None: 1 each); those outside [-1, 1] are left out."""
        last = CODEBOOK_BINS + 1  # bins 0 and `last` take what lies outside
        slope = CODEBOOK_BINS / 2 * (1 - 1e-5)  # the ends of a range are inside, whatever their rounding
        bins = normalised.mul(slope).add_(CODEBOOK_BINS / 2 + 1).clamp_(0, last).to(torch.int64)
        count, mass = torch.zeros(2, last + 1, device=normalised.device)
        _count_into(count, bins)
        self.count += count[1:last].double().cpu()
        if weight is None:
            mass = count
        else:
            mass.scatter_add_(0, bins, weight)
        self.weight += mass[1:last].double().cpu()

    @property
    def centers(self) -> Tensor:
        """[bins] float64."""
        return (torch.arange(CODEBOOK_BINS, dtype=torch.float64) + 0.5) * (2 / CODEBOOK_BINS) - 1


def _count_into(counts: Tensor, bins: Tensor) -> None:
    """Add 1 to counts [m] float32 for each of bins [n] int64. `torch.bincount` takes several times as long."""
    counts.scatter_add_(0, bins, counts.new_ones(1).expand_as(bins))
