"""Trellis-coded streams as the compiled attention of `cpu` reads them.

Coefficients are multiplied in grid steps. What makes channels of them goes to the queries, for keys, and to the finished
sums, for values; what the mean of keys adds to a score is added to coefficients, at the same cost for any number of queries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.attention.cpu.int16 import STREAM_KERNELS
from narrowkv.attention.cpu.tables import ValueMatrix, compiled
from narrowkv.attention.rope import AnyRope
from narrowkv.attention.streams import KeyCoefficients, ValueChannels, grid_scales
from narrowkv.codec import AnyQuantizer, TrellisQuantizer
from narrowkv.store import LayerStore

LARGEST, MAX_KEY_SCALE = 2**15 - 1, 2**8 - 1  # of words


def key_streams(quantizer: TrellisQuantizer, rope: AnyRope | None) -> tuple[_kernels.Streams, list[Tensor]]:
    """Keys in streams as the kernel reads them, and tables of it. rope: of keys that are stored before it.

    Raises UnsupportedModelError where it is not that of the calibration.
    """
    found = KeyCoefficients.of(quantizer, rope, "cpu")
    return _streams(
        quantizer,
        query_index=found.query_index.int(),
        channels=found.frames.channels.int(),
        query_rotations=found.query_rotations,
        offsets=found.offsets.float().contiguous(),
        int16=_int16_keys(quantizer, found.offsets) if STREAM_KERNELS else None,
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
    """Values in streams: what the kernel reads of them with its tables, and what makes channels of its sums."""

    streams: _kernels.Streams
    tables: list[Tensor]
    matrix: ValueMatrix

    @classmethod
    def of(cls, quantizer: TrellisQuantizer) -> "StreamValues":
        found = ValueChannels.of(quantizer)
        return cls(*_streams(quantizer), ValueMatrix.padded(found.matrix, found.mean.contiguous()))


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
        of_values = [*self.values.tables, *self.values.matrix.tensors()] if self.values else []
        return [*self.key_tables, *of_values]

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


def _streams(
    quantizer: TrellisQuantizer,
    *,
    query_index: Tensor | None = None,
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
        finer=(1 / grid_scales(quantizer)).float(),
        query_index=query_index,
        channels=channels,
        query_rotations=query_rotations,
        offsets=offsets,
        uses_int16=bool(STREAM_KERNELS) if query_index is None else int16 is not None,
        **(int16 or {}),
    )
