"""Trellis-coded streams as compiled attention reads them: coefficients in grid steps, and what makes channels of them.

Keys: queries are multiplied by what makes channels of coefficients, rotated to a position that all tokens of a frame share,
and what the mean of keys adds is added to coefficients. Values: the finished sums are multiplied.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowkv.attention.rope import AnyRope, frames_of
from narrowkv.codec import TrellisQuantizer
from narrowkv.codec.frames import FRAME, MIDDLE, Frames
from narrowkv.codec.pairs import times, to_pairs
from narrowkv.errors import UnsupportedModelError

EXACT_ENOUGH = 1e-4  # of the mean of keys, as coefficients have it


@dataclass(frozen=True)
class KeyCoefficients:
    """How queries meet the coefficients of keys, in the order of the stream, those without codes last; d is head_dim.

    query_index: [kv_heads, d] int64, element of a query that each multiplies. steps: [d] float64, what a grid step of each is,
    1 without codes. query_rotations: [kv_heads, 2, 2, 2, d / 2] float32, by angle (0, and a quarter of a cycle further),
    element of a pair of the transform, and of the model. offsets: [kv_heads, d, 16] float64, what the mean of keys adds at
    each token of a frame, in grid steps.
    """

    query_index: Tensor
    steps: Tensor
    frames: Frames
    query_rotations: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, quantizer: TrellisQuantizer, rope: AnyRope | None, backend: str) -> "KeyCoefficients":
        """rope: of keys that are stored before it. Raises UnsupportedModelError where it is not that of the calibration."""
        assert quantizer.mean is not None and quantizer.order is not None
        nothing = torch.zeros(0, dtype=torch.float32, device=quantizer.mean.device)
        frames = quantizer.frames or Frames.of(quantizer.mean.shape[1], nothing)
        require_rope(frames, rope, backend)
        query_index, scales = _query_index(quantizer.order, quantizer.mean.shape[1]), grid_scales(quantizer)
        steps = torch.nn.functional.pad(scales, (0, query_index.shape[1] - len(scales)), value=1.0)
        by_element = torch.ones_like(query_index, dtype=torch.float64).scatter(
            1, query_index, steps.expand(len(query_index), -1)
        )
        offsets = (_offsets(quantizer, frames, backend) / by_element[:, None]).mT
        offsets = offsets.gather(1, query_index[..., None].expand(-1, -1, FRAME))
        return cls(query_index, steps, frames, _query_rotations(quantizer, frames, by_element), offsets)


@dataclass(frozen=True)
class ValueChannels:
    """What makes channels of sums of values: matrix [kv_heads, n, head_dim], mean [kv_heads, head_dim], float32."""

    matrix: Tensor
    mean: Tensor

    @classmethod
    def of(cls, quantizer: TrellisQuantizer) -> "ValueChannels":
        assert quantizer.mean is not None
        scales, device = grid_scales(quantizer).float(), quantizer.mean.device
        one_by_one = torch.eye(len(scales), dtype=torch.float32, device=device).expand(1, len(quantizer.mean), -1, -1)
        matrix = scales[:, None] * quantizer.channels_of(one_by_one)[0]
        return cls(matrix.contiguous(), quantizer.mean.float())

    def channels(self, sums: Tensor, totals: Tensor) -> Tensor:
        """Sums of coefficients [batch, query_heads, queries, n or more], of which n count, and of weights, as channels."""
        heads, n, _ = self.matrix.shape
        by_head = sums.reshape(len(sums), heads, -1, sums.shape[-1])[..., :n]
        found = by_head @ self.matrix + totals.reshape(len(sums), heads, -1, 1) * self.mean[:, None]
        return found.view(*sums.shape[:-1], -1)

    def elements(self, coefficients: Tensor) -> Tensor:
        """Coefficients [batch, kv_heads, tokens, n or more] in grid steps, of which n count, as channels, in their dtype."""
        dtype = coefficients.dtype
        found = coefficients[..., : self.matrix.shape[1]] @ self.matrix.to(dtype)
        return found.add_(self.mean[:, None].to(dtype))


def grid_scales(quantizer: TrellisQuantizer) -> Tensor:
    """What a grid step of each coefficient is, [n] float64."""
    assert quantizer.scales is not None
    return quantizer.scales.double()[quantizer.rates - 1]


def require_rope(frames: Frames, rope: AnyRope | None, backend: str) -> None:
    """Raise UnsupportedModelError unless keys rotate in their frames as the rotary embedding rotates them."""
    expected = frames_of(rope, len(frames.channels))
    alike = expected is not None and torch.equal(expected.channels, frames.channels.cpu())
    if expected is None or not (alike and torch.allclose(expected.frequencies, frames.frequencies.cpu())):
        raise UnsupportedModelError(
            f"Keys were calibrated for another rotary embedding than the model has, or its angles have no positions, which "
            f"backend {backend} does not read in trellis-coded streams; calibrate the model, or choose backend torch."
        )


def _query_index(order: Tensor, head_dim: int) -> Tensor:
    """Index of the element of a query that each coefficient multiplies, [kv_heads, head_dim] int64.

    order: [kv_heads, n], of coefficients with codes, which come first.
    """
    every = torch.arange(head_dim, dtype=torch.int64, device=order.device).expand(len(order), -1)
    return (every + head_dim).scatter(1, order.long(), every[:, : order.shape[1]]).argsort(1)


def _query_rotations(quantizer: TrellisQuantizer, frames: Frames, steps: Tensor) -> Tensor:
    """`KeyCoefficients.query_rotations`; steps: what a grid step of each coefficient is, [kv_heads, head_dim] float64."""
    assert quantizer.pairs is not None
    pairs = quantizer.pairs.double() * to_pairs(steps)[..., None]
    angles = frames.frequencies.double() * (FRAME - MIDDLE)  # from the middle to where all tokens of a frame are rotated
    cos, sin = angles.cos(), angles.sin()
    still = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])  # [2, 2, pairs]
    quarter = torch.stack([still[1], -still[0]])
    return torch.stack([torch.einsum("hdij,jkd->hikd", pairs, by) for by in (still, quarter)], dim=1).float().contiguous()


def _offsets(quantizer: TrellisQuantizer, frames: Frames, backend: str) -> Tensor:
    """The mean of keys at each token of a frame, as coefficients: [kv_heads, 16, head_dim] float64."""
    assert quantizer.mean is not None and quantizer.pairs is not None
    rotated = frames.rotate(quantizer.mean.double()[:, None].expand(-1, FRAME, -1), 0)
    pairs = quantizer.pairs.double()[:, None]
    found = times(rotated, torch.linalg.pinv(pairs))
    missed = times(found, pairs) - rotated
    if missed.norm() > EXACT_ENOUGH * rotated.norm():
        raise UnsupportedModelError(
            f"The mean of keys lies where their transform has nothing, so backend {backend} cannot add it; choose "
            "backend torch."
        )
    return found
