"""K-means of many small problems at once: the codebooks of all channels, or of all pairs of channels, of a layer.

Codebooks grow by splitting (Linde, Buzo and Gray 1980): every point becomes two along the direction in which its cluster is
longest, then Lloyd's iterations settle them. All sizes on the way are codebooks too.
"""

import torch
from torch import Tensor

DISTANCES = 2**22  # distances computed at a time
GROWING, SETTLING, LAST = 6, 12, 4  # iterations of sizes that are passed, of those that are wanted; those that move no point
WORTH = 8  # how many times as large an error must be for a point to be moved there


class Books:
    """Codebooks of the same vectors in several sizes; each is computed once, from the next smaller one."""

    def __init__(self, vectors: Tensor):
        """vectors: [problems, samples, 1 or 2 numbers] float32, in units in which errors of all numbers matter alike."""
        self._center = vectors.mean(1, keepdim=True)
        self._vectors = vectors - self._center  # so that differences keep their digits
        self._points = {0: torch.zeros_like(self._center)}

    def points(self, bits: int) -> Tensor:
        """Codebooks of 2**bits points: [problems, 2**bits, numbers], sorted by their first number."""
        if bits not in self._points:
            start = max(width for width in self._points if width < bits)
            points = self._points[start]
            for width in range(start + 1, bits + 1):
                points = _settle(self._vectors, _split(self._vectors, points), SETTLING if width == bits else GROWING)
            self._points[bits] = points
        points = self._points[bits] + self._center
        order = points[..., 0].sort(dim=1, stable=True).indices
        return points.gather(1, order[..., None].expand_as(points))


def _nearest(vectors: Tensor, points: Tensor) -> Tensor:
    """Index of the nearest point: [problems, samples] int64."""
    problems, samples, _ = vectors.shape
    nearest = torch.empty(problems, samples, dtype=torch.int64, device=vectors.device)
    half = -0.5 * points.square().sum(-1)[:, None]  # [problems, 1, points]
    rows = max(DISTANCES // (samples * points.shape[1]), 1)
    for start in range(0, problems, rows):
        part = slice(start, start + rows)
        nearest[part] = torch.baddbmm(half[part], vectors[part], points[part].transpose(1, 2)).argmax(-1)
    return nearest


def _sums(numbers: Tensor, nearest: Tensor, count: int) -> Tensor:
    """Sums over clusters: numbers [problems, samples, n] -> [problems, count, n]."""
    zeros = numbers.new_zeros(numbers.shape[0], count, numbers.shape[2])
    return zeros.scatter_add_(1, nearest[..., None].expand(-1, -1, numbers.shape[2]), numbers)


def _steps(vectors: Tensor, nearest: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Where each cluster is longest, by most of its deviation, and its sum of squared errors.

    Returns [problems, points, numbers] and [problems, points].
    """
    count = points.shape[1]
    missed = vectors - points.gather(1, nearest[..., None].expand_as(vectors))
    size = _sums(torch.ones_like(missed[..., :1]), nearest, count).clamp(min=1)
    squares = _sums(missed.square(), nearest, count)
    variance = squares / size
    if vectors.shape[-1] == 1:
        step = variance.sqrt()
    else:  # the longer axis of the ellipse of a 2 x 2 covariance
        covariance = (_sums(missed.prod(-1, keepdim=True), nearest, count) / size).squeeze(-1)
        first, second = variance.unbind(-1)
        angle = torch.atan2(2 * covariance, first - second) / 2
        length = ((first + second) / 2 + torch.hypot((first - second) / 2, covariance)).sqrt()
        step = length[..., None] * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return 0.8 * step, squares.sum(-1)


def _split(vectors: Tensor, points: Tensor) -> Tensor:
    """Two points for each, one either way."""
    step, _ = _steps(vectors, _nearest(vectors, points), points)
    return torch.cat([points - step, points + step], dim=1)


def _settle(vectors: Tensor, points: Tensor, iterations: int) -> Tensor:
    """Lloyd's iterations; in the first of them, points of clusters without much error help out where there is most."""
    count = points.shape[1]
    for iteration in range(iterations):
        nearest = _nearest(vectors, points)
        size = _sums(torch.ones_like(vectors[..., :1]), nearest, count)
        points = torch.where(size > 0, _sums(vectors, nearest, count) / size.clamp(min=1), points)
        if iteration < iterations - LAST and count > 1:
            points = _move(vectors, nearest, points)
    return points


def _move(vectors: Tensor, nearest: Tensor, points: Tensor) -> Tensor:
    """Take points away where the error is small and put them beside those where it is WORTH times as large.

    An optimal codebook has about the same error in all clusters (Gersho 1979), to which plain iterations find slowly.
    """
    step, error = _steps(vectors, nearest, points)
    ordered, order = error.sort(dim=1)
    few = max(points.shape[1] // 4, 1)
    moving = ordered[:, :few] * WORTH < ordered.flip(1)[:, :few]
    idle, busy = (
        order[:, :few, None].expand(-1, -1, points.shape[2]),
        order.flip(1)[:, :few, None].expand(-1, -1, points.shape[2]),
    )
    center, side = points.gather(1, busy), torch.where(moving[..., None], step.gather(1, busy), 0)
    moved = points.scatter(1, busy, center - side)
    return moved.scatter(1, idle, torch.where(moving[..., None], center + side, points.gather(1, idle)))
