"""K-means of many small problems at once: the codebooks of all channels, or of all pairs of channels, of a layer.

Codebooks grow by splitting (Linde, Buzo and Gray 1980): every point becomes two along the direction in which its cluster is
longest, then Lloyd's iterations settle them. All sizes on the way are codebooks too.
"""

import torch
from torch import Tensor

from narrowkv.codec.points import moments, nearest, to_vectors

GROWING, SETTLING, LAST = 6, 16, 4  # iterations of sizes that are passed, of those that are wanted; those that move no point


class Books:
    """Codebooks of the same numbers in several sizes; each is computed once, from the next smaller one."""

    def __init__(self, numbers: Tensor, count: int):
        """numbers: [heads, samples, head_dim] float32, in units in which all errors matter alike. count: of numbers that share
        a code, 1 or 2.
        """
        center = numbers.mean(1, keepdim=True)
        self._samples = _Samples((numbers - center).contiguous(), count)  # so that differences keep their digits
        self._center = to_vectors(center, count).transpose(1, 2)  # [heads, codes, 1, count]
        self._points = {0: torch.zeros_like(self._center)}

    def points(self, bits: int) -> Tensor:
        """Codebooks of 2**bits points: [heads, codes, 2**bits, count], sorted by their first number."""
        if bits not in self._points:
            start = max(width for width in self._points if width < bits)
            points = self._points[start]
            for width in range(start + 1, bits + 1):
                points = _settle(self._samples, _split(self._samples, points), SETTLING if width == bits else GROWING)
            self._points[bits] = points
        points = self._points[bits] + self._center
        order = points[..., 0].sort(dim=2, stable=True).indices
        return points.gather(2, order[..., None].expand_as(points))


class _Samples:
    """What is clustered: numbers [heads, samples, head_dim]."""

    def __init__(self, numbers: Tensor, count: int):
        self.numbers = numbers
        self.count = count

    def clusters(self, points: Tensor) -> "_Clusters":
        """The clusters of points [heads, codes, points, count]."""
        codes, _ = nearest(self.numbers[None], points)
        sums = moments(self.numbers, codes[0], points.shape[2], self.count)
        size, (total, squares, products) = sums[..., :1], sums[..., 1:].split([self.count, self.count, self.count - 1], dim=-1)
        filled = size.clamp(min=1)
        mean = torch.where(size > 0, total / filled, points.double())
        variance = (squares / filled - (total / filled).square()).clamp(min=0)
        covariance = products / filled - (total / filled).prod(-1, keepdim=True) if self.count == 2 else None
        return _Clusters(mean.float(), size.squeeze(-1).float(), variance.float(), covariance)


class _Clusters:
    """Of each cluster the mean and the variance [heads, codes, points, count], its size, and of pairs the covariance."""

    def __init__(self, mean: Tensor, size: Tensor, variance: Tensor, covariance: Tensor | None):
        self.mean, self.size, self.variance, self.covariance = mean, size, variance, covariance

    @property
    def error(self) -> Tensor:
        """Sum of squared errors: [heads, codes, points]."""
        return self.variance.sum(-1) * self.size

    @property
    def step(self) -> Tensor:
        """Along which a cluster is longest, by most of its deviation: [heads, codes, points, count]."""
        if self.covariance is None:
            return 0.8 * self.variance.sqrt()
        first, second = self.variance.unbind(-1)
        covariance = self.covariance.squeeze(-1).float()
        angle = torch.atan2(2 * covariance, first - second) / 2  # of the longer axis of the ellipse
        length = ((first + second) / 2 + torch.hypot((first - second) / 2, covariance)).sqrt()
        return 0.8 * length[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)


def _split(samples: _Samples, points: Tensor) -> Tensor:
    """Two points for each, one either way."""
    step = samples.clusters(points).step
    return torch.cat([points - step, points + step], dim=2)


def _settle(samples: _Samples, points: Tensor, iterations: int) -> Tensor:
    """Lloyd's iterations; all but the last of them move points that are hardly needed to where there is most error."""
    for iteration in range(iterations):
        clusters = samples.clusters(points)
        points = clusters.mean if iteration >= iterations - LAST else _move(clusters)
    return points


def _move(clusters: _Clusters) -> Tensor:
    """The means, but for points that cost little to take away: these go where half of a cluster's error is more than that.

    An optimal codebook has about the same error in all clusters (Gersho 1979), to which plain iterations find slowly.
    """
    points = clusters.mean
    loss, idle = (clusters.size * _nearest_other(points)).sort(dim=2)
    gain, busy = clusters.error.sort(dim=2, descending=True)
    few = max(points.shape[2] // 4, 1)
    moving = (loss < gain / 2)[:, :, :few, None]
    idle, busy = (part[:, :, :few, None].expand(-1, -1, -1, points.shape[3]) for part in (idle, busy))
    center, side = points.gather(2, busy), torch.where(moving, clusters.step.gather(2, busy), 0)
    moved = points.scatter(2, busy, center - side)
    return moved.scatter(2, idle, torch.where(moving, center + side, moved.gather(2, idle)))


def _nearest_other(points: Tensor) -> Tensor:
    """Squared distance of each point to the nearest other one: [heads, codes, points]."""
    own = torch.eye(points.shape[2], dtype=torch.bool, device=points.device)
    distances = [torch.cdist(head, head).masked_fill_(own, torch.inf).amin(-1) for head in points]  # a head at a time
    return torch.stack(distances).square()
