"""Tables by which kernels on a GPU read trellis-coded streams: where each coefficient lies, and what its codes stand for."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from narrowkv.attention.rope import AnyRope, Rope
from narrowkv.attention.streams import KeyCoefficients, ValueChannels, grid_scales
from narrowkv.codec import AnyQuantizer, TrellisQuantizer
from narrowkv.codec.scheme_parts import MOST_RATE
from narrowkv.codec.trellis import NIBBLE, STATES
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import LayerStore

LARGEST = 46_000  # of elements in 16 bits: like those of `unpack`
FIELDS = 16  # of a coefficient's row in `codes`


@dataclass(frozen=True)
class StreamTables:
    """Of one side, whose n coefficients come in the order of the stream; d is head_dim.

    codes: [16, n] int32: the byte in which a code ends, by how many bits before the byte's end, which bits of a state are of
        that byte (in each byte of a word), the least entry, where entries of its rate begin, three unused; in words of four
        bytes, what the lower 4 bits of a state add to half of the least entry, and the upper.
    entries: [6 * 256] float32, of each rate and state. finer: [n] float32, grid steps of 1.
    Of keys alone, else None: channels: [kv_heads, d, 2] int32, weights: [kv_heads, d, 4] float32, by which two channels of a
        query become a coefficient of it, at an angle of 0 and a quarter of a cycle further. offsets: [kv_heads, 16, d]
        float32, what the mean of keys adds at each token of a frame. cycles: [kv_heads, d] float64, by which they rotate.
    pairs: [kv_heads, d / 2, 4] int32, two coefficients and the channels that they become; pair_weights: [kv_heads, d / 2, 4]
        float32, what a grid step of the first is in both channels, and of the second.
    """

    codes: Tensor
    entries: Tensor
    finer: Tensor
    channels: Tensor | None = None
    weights: Tensor | None = None
    offsets: Tensor | None = None
    cycles: Tensor | None = None
    pairs: Tensor | None = None
    pair_weights: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [part for each in fields(self) if (part := getattr(self, each.name)) is not None]

    @classmethod
    def of_keys(cls, quantizer: TrellisQuantizer, rope: AnyRope | None) -> "StreamTables":
        """rope: of keys that are stored before it. Raises UnsupportedModelError where it is not that of the calibration, and
        where the mean of keys overflows 16 bits.
        """
        found = KeyCoefficients.of(quantizer, rope, "cuda")
        if found.offsets.abs().amax() > LARGEST:
            raise UnsupportedModelError("The mean of keys exceeds 16 bits in grid steps; choose backend torch.")
        heads, dim = found.query_index.shape
        scaling = torch.ones(dim // 2, dtype=torch.float32, device=found.query_index.device)
        if isinstance(rope, Rope):
            scaling[: len(rope.inverse_frequencies)] = rope.scaling
        rotations = (found.query_rotations * scaling).permute(0, 2, 4, 1, 3)  # [kv_heads, element, pair, angle, channel]
        channels = found.frames.channels.int().view(2, -1).T  # [pair, 2]
        pair = found.query_index % (dim // 2)
        weights = rotations.reshape(heads, dim, 4)
        cycles = found.frames.frequencies.double() / (2 * torch.pi)
        return cls(
            *_codes(quantizer),
            channels=channels[pair].contiguous(),
            weights=weights.gather(1, found.query_index[..., None].expand(-1, -1, 4)).contiguous(),
            offsets=found.offsets.mT.float().contiguous(),
            cycles=cycles[pair].contiguous(),
            **_pairs(quantizer, found, channels),
        )

    @classmethod
    def of_values(cls, quantizer: TrellisQuantizer) -> "StreamTables":
        return cls(*_codes(quantizer))


@dataclass(frozen=True)
class Streams:
    """Both sides of a store in streams, and what makes channels of sums of values.

    quantizers, rope: of which that was made.
    """

    quantizers: tuple[AnyQuantizer, AnyQuantizer]
    rope: AnyRope | None
    keys: StreamTables
    values: StreamTables
    sums: ValueChannels

    @classmethod
    def of(cls, store: LayerStore, rope: AnyRope | None) -> "Streams | None":
        """Made once for a store; None of one that has other codes. rope: of keys that are stored before it."""
        keys, values = store.quantizers
        if not (isinstance(keys, TrellisQuantizer) and isinstance(values, TrellisQuantizer)):
            return None
        known = store.plans.get(cls)
        if known is None or known.quantizers is not store.quantizers or known.rope is not rope:
            tables = StreamTables.of_keys(keys, rope), StreamTables.of_values(values)
            known = store.plans.put(cls(store.quantizers, rope, *tables, ValueChannels.of(values)))
        return known

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [*self.keys.tensors(), *self.values.tensors(), self.sums.matrix, self.sums.mean]


def _codes(quantizer: TrellisQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """`codes`, `entries` and `finer` of a quantizer."""
    assert quantizer.entries is not None
    rates = quantizer.rates
    end = rates.cumsum(0)
    last = (end - 1) // 8
    shift = 8 * last + 8 - end
    own = (0xFF >> shift) * 0x01010101
    high, low = quantizer.entries[0].int().unbind(1)  # [6, 16]
    least = high.amin(1, keepdim=True), low.amin(1, keepdim=True)
    row = torch.stack([last, shift, own, (least[0] + least[1])[rates - 1, 0], (rates - 1) * STATES], dim=1)
    words = [(part - lowest)[rates - 1] for part, lowest in zip((low, high), reversed(least), strict=True)]
    row = torch.nn.functional.pad(row, (0, FIELDS - 2 * NIBBLE // 4 - row.shape[1]))
    codes = torch.cat([row, *(_as_words(part) for part in words)], dim=1)
    entries = (high[:, :, None] + low[:, None]).view(MOST_RATE * STATES)
    return codes.T.to(torch.int32).contiguous(), entries.float(), (1 / grid_scales(quantizer)).float()


def _as_words(small: Tensor) -> Tensor:
    """Integers [n, 16] of up to 7 bits as bytes of words: [n, 4] int64."""
    shifts = 8 * torch.arange(4, dtype=torch.int64, device=small.device)
    return (small.long().unflatten(1, (4, 4)) << shifts).sum(-1)


def _pairs(quantizer: TrellisQuantizer, found: KeyCoefficients, channels: Tensor) -> dict[str, Tensor]:
    """`pairs` and `pair_weights`; channels: [d / 2, 2] of each pair of the transform."""
    assert quantizer.pairs is not None
    heads = len(found.query_index)
    slots = found.query_index.argsort(1).view(heads, 2, -1)  # the coefficient of the stream of each element of a pair
    steps = found.steps[slots].mT[..., None]  # [kv_heads, pairs, 2, 1]
    both = torch.cat([slots.mT.int(), channels.expand(heads, -1, -1)], dim=2)
    return {"pairs": both.contiguous(), "pair_weights": (quantizer.pairs.double() * steps).float().flatten(2).contiguous()}
