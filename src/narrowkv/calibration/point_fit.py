"""From streams of keys or values to codebooks of channels or of pairs of channels."""

from dataclasses import replace

import torch
from torch import Tensor

from narrowkv.calibration.clusters import Books
from narrowkv.calibration.processes import Group
from narrowkv.calibration.samples import Samples
from narrowkv.calibration.statistics import metric_axes, quantile
from narrowkv.codec import PointQuantizer, Scheme
from narrowkv.codec.points import from_vectors, to_vectors
from narrowkv.codec.ranges import require_finite, to_16_bits


class PointFit:
    """Learns all codebooks of channels and pairs of one tensor of one layer, in the second of the passes that `Fit` has."""

    needs_codebook = True

    def __init__(self) -> None:
        self.samples = Samples()
        self._books: dict[tuple[str, bool, bool], tuple[Books, Tensor, Tensor | None]] = {}

    def see_range(self, x: Tensor) -> None:
        """First pass. x: [tokens, kv_heads, head_dim]. Raises ActivationError on NaN and infinity."""
        require_finite(x, "Keys or values")

    def see_codebook(self, x: Tensor, gradient: Tensor | None) -> None:
        """Second pass. x, gradient: [tokens, kv_heads, head_dim], as of `Fit.see_codebook`."""
        self.samples.add(x, gradient)

    def merge_ranges(self, group: Group) -> None:
        """Nothing was learned in the first pass."""

    def merge_codebook(self, group: Group) -> None:
        """After the second pass: take in what the other processes of a group have seen."""
        self.samples.merge(group)

    def quantizer(self, shape: tuple[int, ...], scheme: Scheme) -> PointQuantizer:
        """The finished quantizer of any scheme with codebooks of channels or pairs. shape: kv_heads, head_dim."""
        books, weight, turn = self._prepare(scheme)
        points = books.points(scheme.code_bits) / weight.sqrt()[:, :, None]
        rounded = to_16_bits(points, torch.float16, "Codebooks")
        limit = torch.full((1,), torch.inf, dtype=torch.float32, device="cpu") if scheme.outliers else None
        quantizer = PointQuantizer(scheme, rounded, weight, limit, turn)
        if scheme.outliers:
            _, cost = quantizer.nearest(self.samples.heads())
            quantizer = replace(quantizer, limit=quantile(cost.flatten(), 1 - scheme.outliers))
        return quantizer

    def _prepare(self, scheme: Scheme) -> tuple[Books, Tensor, Tensor | None]:
        """The vectors to be clustered, what errors in them cost, and the rotation before them."""
        weighted = scheme.weighting != "none"
        key = (scheme.codebook, scheme.turn, weighted)
        if key not in self._books:
            numbers, fisher, turn = self.samples.heads(), self.samples.fisher(weighted), None
            if scheme.turn:
                turn = rotation(numbers[0].double(), fisher).half()
                numbers, fisher = (numbers.double() @ turn.double()).float(), turn.double().mT @ fisher @ turn.double()
            weight = to_vectors(fisher.diagonal(dim1=1, dim2=2), scheme.numbers).float().contiguous()
            books = Books(numbers[0] * from_vectors(weight.sqrt())[:, None], scheme.numbers)
            self._books[key] = (books, weight, turn)
        return self._books[key]


def rotation(numbers: Tensor, fisher: Tensor) -> Tensor:
    """The orthogonal matrix after which a head's channels are uncorrelated, as far as the loss can tell.

    numbers: [kv_heads, n, head_dim], fisher: [kv_heads, head_dim, head_dim], float64. Its columns are the eigenvectors of the
    covariance, seen in the metric of the loss halfway to the plain one, so ordered that a pair (d, d + head_dim / 2) holds one
    of the larger and one of the smaller variances: the pair's code then splits its bits between them as they need it.
    """
    centered = numbers - numbers.mean(1, keepdim=True)
    covariance = centered.mT @ centered / numbers.shape[1]
    axes = metric_axes(covariance, fisher, plain=1.0)
    half = axes.shape[-1] // 2
    return torch.cat([axes.flip(-1)[..., : axes.shape[-1] - half], axes[..., :half]], dim=-1)
