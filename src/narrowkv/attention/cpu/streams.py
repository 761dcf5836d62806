"""Trellis-coded streams as the compiled attention of `cpu` reads them.

Coefficients are multiplied in grid steps. What makes channels of them goes to the queries, for keys, and to the finished
sums, for values; what the mean of keys adds to a score is added to coefficients, at the same cost for any number of queries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.attention.cpu.int16 import SUPPORTED
from narrowkv.attention.cpu.tables import compiled
from narrowkv.attention.rope import AnyRope, frames_of
from narrowkv.codec import AnyQuantizer, TrellisQuantizer
from narrowkv.codec.frames import FRAME, MIDDLE, Frames
from narrowkv.codec.pairs import times, to_pairs
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import BLOCK, LayerStore

LARGEST, MAX_KEY_SCALE = 2**15 - 1, 2**8 - 1  # of words
EXACT_ENOUGH = 1e-4  # of the mean of keys, as coefficients have it


def key_streams(quantizer: TrellisQuantizer, rope: AnyRope | None) -> tuple[_kernels.Streams, list[Tensor]]:
    """Keys in streams as the kernel reads them, and tables of it. rope: of keys that are stored before it.

    Raises UnsupportedModelError where it is not that of the calibration.
    """
    assert quantizer.mean is not None and quantizer.order is not None
    frames = quantizer.frames or Frames.of(quantizer.mean.shape[1])
    _require_rope(frames, rope)
    places, scales = _places(quantizer.order, quantizer.mean.shape[1]), _scales(quantizer)
    steps = torch.ones_like(places, dtype=torch.float64)  # of the coefficient in each place
    steps.scatter_(1, places[:, : len(scales)], scales.expand(len(steps), -1))
    offsets = (_offsets(quantizer, frames) / steps[:, None]).mT.gather(1, places[..., None].expand(-1, -1, FRAME))
    return _streams(
        quantizer,
        places=places.int(),
        channels=frames.channels.int(),
        query_rotations=_query_rotations(quantizer, frames, steps),
        offsets=offsets.float().contiguous(),
        int16=_int16_keys(quantizer, offsets) if SUPPORTED else None,
    )


def _int16_keys(quantizer: TrellisQuantizer, offsets: Tensor) -> dict[str, Tensor] | None:
    """Keys in int16: the scales of coefficients, and offsets [kv_heads, head_dim, 16] likewise.

    Stretched by as much as makes the largest sum of both a word, up to a byte; None where not even 1 does.
    """
    assert quantizer.entries is not None
    high, low = quantizer.entries[0].unbind(1)
    largest = (high[..., None] + low[:, None]).double().abs().flatten(1).amax(1)  # wraps, as it does in the kernel
    coded = largest[quantizer.rates - 1]
    steps = torch.nn.functional.pad(coded, (0, offsets.shape[1] - len(coded)))
    most = torch.where(steps > 0, float(MAX_KEY_SCALE), float(LARGEST))
    int16_scales = ((LARGEST - 1) / (steps + offsets.abs().amax(-1))).floor().minimum(most)
    if bool((int16_scales < 1).any()):
        return None
    int16 = (offsets * int16_scales[..., None]).round()
    int16_maxima = steps * int16_scales + int16.abs().amax(-1)
    pairs = int16.short().unflatten(1, (-1, 2)).transpose(2, 3)
    return {"int16_scales": int16_scales.int(), "int16_maxima": int16_maxima.int(), "int16_offsets": pairs.contiguous()}


@dataclass(frozen=True)
class StreamValues:
    """Values in streams: what the kernel reads of them with its tables, and what makes channels of its sums.

    matrix: [kv_heads, n, head_dim], mean: [kv_heads, head_dim], float32.
    """

    streams: _kernels.Streams
    tables: list[Tensor]
    matrix: Tensor
    mean: Tensor

    @classmethod
    def of(cls, quantizer: TrellisQuantizer) -> "StreamValues":
        assert quantizer.mean is not None
        scales = _scales(quantizer).float()
        one_by_one = torch.eye(len(scales), dtype=torch.float32, device="cpu").expand(1, len(quantizer.mean), -1, -1)
        matrix = scales[:, None] * quantizer.channels_of(one_by_one)[0]
        return cls(*_streams(quantizer), matrix.contiguous(), quantizer.mean.float())

    def channels(self, sums: Tensor, totals: Tensor) -> Tensor:
        """Sums of coefficients [batch, query_heads, queries, head_dim], of which n count, and of weights, as channels."""
        heads, n, _ = self.matrix.shape
        by_head = sums.view(len(sums), heads, -1, sums.shape[-1])[..., :n]
        found = by_head @ self.matrix + totals.view(len(sums), heads, -1, 1) * self.mean[:, None]
        return found.view(sums.shape)


@dataclass(frozen=True)
class Streams:
    """Which sides of a store are streams, and of which quantizers and rotary embedding that was made."""

    quantizers: tuple[AnyQuantizer, AnyQuantizer]
    rope: AnyRope | None
    keys: _kernels.Streams | None
    key_tables: list[Tensor]
    values: StreamValues | None

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [*self.key_tables, *((*self.values.tables, self.values.matrix, self.values.mean) if self.values else ())]

    @classmethod
    def of(cls, store: LayerStore, rope: AnyRope | None) -> "Streams":
        """Made once, not with every block that comes. rope: of keys that are stored before it."""
        known = store.plans.get(Streams)
        if known is None or known.quantizers is not store.quantizers or known.rope is not rope:
            keys, values = store.quantizers
            of_keys, tables = key_streams(keys, rope) if isinstance(keys, TrellisQuantizer) else (None, [])
            of_values = StreamValues.of(values) if isinstance(values, TrellisQuantizer) else None
            known = store.plans.put(cls(store.quantizers, rope, of_keys, tables, of_values))
        return known


def steps_to_anchors(starts: Tensor) -> Tensor:
    """What leads from a token's position to one that all tokens of a frame share where theirs follow each other.

    starts: [blocks + 1] int64, the first token of each block and where the last one ends. Returns [tokens of blocks and of one
    more] int32: to FRAME - MIDDLE behind the middle of the frame, which is not below 0 where positions are not.
    """
    lengths = torch.nn.functional.pad(starts.diff(), (0, 1), value=BLOCK)
    every = torch.arange(int(starts[-1]) + BLOCK, dtype=torch.int64, device="cpu")
    return (FRAME - (every - starts.repeat_interleave(lengths)) % FRAME).int()


def _places(order: Tensor, head_dim: int) -> Tensor:
    """All places of coefficients, [kv_heads, head_dim] int64: order [kv_heads, n], of those with codes, then the others."""
    every = torch.arange(head_dim, dtype=torch.int64, device="cpu").expand(len(order), -1)
    return (every + head_dim).scatter(1, order.long(), every[:, : order.shape[1]]).argsort(1)


def _query_rotations(quantizer: TrellisQuantizer, frames: Frames, steps: Tensor) -> Tensor:
    """What makes a query that meets coefficients of the model's, at an angle of 0 and a quarter of a cycle further.

    steps: what a grid step of each coefficient is, [kv_heads, head_dim] float64. Returns [kv_heads, 2, 2, 2, pairs] float32:
    angle, number of a pair as coefficients see it, of the model's pair.
    """
    assert quantizer.pairs is not None
    pairs = quantizer.pairs.double() * to_pairs(steps)[..., None]
    angles = frames.frequencies.double() * (FRAME - MIDDLE)  # from the middle to where `steps_to_anchors` leads
    cos, sin = angles.cos(), angles.sin()
    still = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])  # [2, 2, pairs]
    quarter = torch.stack([still[1], -still[0]])
    return torch.stack([torch.einsum("hdij,jkd->hikd", pairs, by) for by in (still, quarter)], dim=1).float().contiguous()


def _offsets(quantizer: TrellisQuantizer, frames: Frames) -> Tensor:
    """The mean of keys at each token of a frame, as coefficients: [kv_heads, 16, head_dim] float64."""
    assert quantizer.mean is not None and quantizer.pairs is not None
    rotated = frames.rotate(quantizer.mean.double()[:, None].expand(-1, FRAME, -1), 0)
    pairs = quantizer.pairs.double()[:, None]
    found = times(rotated, torch.linalg.pinv(pairs))
    missed = times(found, pairs) - rotated
    if missed.norm() > EXACT_ENOUGH * rotated.norm():
        raise UnsupportedModelError(
            "The mean of keys lies where their transform has nothing, so backend cpu cannot add it; choose backend torch."
        )
    return found


def _require_rope(frames: Frames, rope: AnyRope | None) -> None:
    """Raise UnsupportedModelError unless keys rotate in their frames as the rotary embedding rotates them."""
    expected = frames_of(rope, len(frames.channels))
    alike = expected is not None and torch.equal(expected.channels, frames.channels)
    if expected is None or not (alike and torch.allclose(expected.frequencies, frames.frequencies)):
        raise UnsupportedModelError(
            "Keys were calibrated for another rotary embedding than the model has, or its angles have no positions, which "
            "backend cpu does not read in trellis-coded streams; calibrate the model, or choose backend torch."
        )


def _scales(quantizer: TrellisQuantizer) -> Tensor:
    """What a grid step of each coefficient is, [n] float64."""
    assert quantizer.scales is not None
    return quantizer.scales.double()[quantizer.rates - 1]


def _streams(
    quantizer: TrellisQuantizer,
    *,
    places: Tensor | None = None,
    channels: Tensor | None = None,
    query_rotations: Tensor | None = None,
    offsets: Tensor | None = None,
    int16: dict[str, Tensor] | None = None,
) -> tuple[_kernels.Streams, list[Tensor]]:
    assert quantizer.entries is not None and quantizer.scheme.quantization.counts is not None
    return compiled(
        _kernels.Streams,
        counts=list(quantizer.scheme.quantization.counts[1:]),
        norms=quantizer.scheme.quantization.token_norm,
        high=quantizer.entries[0, :, 0].contiguous(),
        low=quantizer.entries[0, :, 1].contiguous(),
        finer=(1 / _scales(quantizer)).float(),
        places=places,
        channels=channels,
        query_rotations=query_rotations,
        offsets=offsets,
        uses_int16=SUPPORTED if places is None else int16 is not None,
        **(int16 or {}),
    )
