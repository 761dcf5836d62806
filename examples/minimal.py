"""A packed key/value cache in plain torch, in the words of the package: read this first.

One layer, the recipe `nuq3` of KVQuant (arXiv 2401.18079): keys quantized per channel before the rotary embedding, values per
token, by a learned codebook; the first token stays in full precision. What the package does besides: batches with padding,
outliers, sliding windows, several methods, and kernels that attend to the packed bytes without dequantizing them first.
`tests/test_minimal.py` holds it against `backend="torch"`. Run it: `python examples/minimal.py`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 64  # tokens that are packed together
PLANES = (2, 1)  # 3 bits are a plane of 2 bits and a plane of 1, so no code straddles a byte


def normalize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Map elements to [-1, 1], where a codebook lies; 0 where a range is empty."""
    return (x - zero) * torch.where(scale > 0, 1 / scale, 0)


def quantize(x: Tensor, scale: Tensor, zero: Tensor, boundaries: Tensor) -> Tensor:
    """The code of each element, uint8: how many boundaries between the levels of the codebook lie below it."""
    return torch.bucketize(normalize(x, scale, zero), boundaries).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, codebook: Tensor) -> Tensor:
    """What codes stand for, float32."""
    return codebook[codes.int()] * scale.float() + zero.float()


def token_ranges(values: Tensor) -> tuple[Tensor, Tensor]:
    """Half the range of each token and its middle, over all heads and channels: [batch, 1, tokens, 1] float16 each."""
    lower, upper = values.float().amin((1, 3), keepdim=True), values.float().amax((1, 3), keepdim=True)
    return ((upper - lower) / 2).half(), ((upper + lower) / 2).half()


def pack(codes: Tensor) -> list[Tensor]:
    """Codes [..., n] uint8 of 3 bits in n * 3 / 8 bytes, one tensor for each plane."""
    planes, shift = [], 0
    for bits in PLANES:
        parts = ((codes >> shift) & (2**bits - 1)).unflatten(-1, (8 // bits, -1)).unbind(-2)
        planes.append(torch.stack([part << (bits * i) for i, part in enumerate(parts)]).sum(0, dtype=torch.uint8))
        shift += bits
    return planes


def unpack(planes: list[Tensor]) -> Tensor:
    """Inverse of `pack`."""
    codes, shift = torch.zeros((), dtype=torch.uint8), 0
    for bits, plane in zip(PLANES, planes, strict=True):
        parts = [(plane >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
        codes = codes | (torch.cat(parts, -1) << shift)
        shift += bits
    return codes


def apply_rope(x: Tensor, positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotate pairs of channels (i, i + head_dim / 2) by position * frequency. x: [batch, heads, tokens, head_dim]."""
    angles = positions[:, None].float() * inverse_frequencies  # [tokens, head_dim / 2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass(frozen=True)
class Block:
    """64 tokens, packed. keys, values: planes of codes; scale, zero: of the values' tokens [batch, 1, 64, 1] float16."""

    keys: list[Tensor]
    values: list[Tensor]
    scale: Tensor
    zero: Tensor

    def tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values, self.scale, self.zero]


@dataclass
class Cache:
    """Keys and values of one layer.

    key_codebook, value_codebook: [8] float32, levels in [-1, 1]. key_scale, key_zero: [kv_heads, head_dim] float32, ranges
    of channels, learned offline. inverse_frequencies: [head_dim / 2], of the rotary embedding.
    """

    key_codebook: Tensor
    value_codebook: Tensor
    key_scale: Tensor
    key_zero: Tensor
    inverse_frequencies: Tensor
    blocks: list[Block] = field(default_factory=list)
    sink: tuple[Tensor, Tensor] | None = None  # the first token, in full precision
    tail: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # codes of keys and values, scale, zero: fewer than 64 tokens

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new tokens, once and for all. keys: not rotated, values: [batch, kv_heads, new, head_dim] each."""
        if self.sink is None:
            self.sink = keys[:, :, :1].clone(), values[:, :, :1].clone()
        scale, zero = token_ranges(values)
        new = (
            quantize(keys.float(), self.key_scale[:, None], self.key_zero[:, None], middles(self.key_codebook)),
            quantize(values.float(), scale.float(), zero.float(), middles(self.value_codebook)),
            scale,
            zero,
        )
        tail = new if self.tail is None else [torch.cat(pair, dim=2) for pair in zip(self.tail, new, strict=True)]
        while tail[0].shape[2] >= BLOCK:
            key_codes, value_codes, scale, zero = (part[:, :, :BLOCK] for part in tail)
            # keys are packed along tokens, as their ranges are those of channels; values along channels
            self.blocks.append(Block(pack(key_codes.mT), pack(value_codes), scale.clone(), zero.clone()))
            tail = [part[:, :, BLOCK:] for part in tail]
        key_codes, value_codes, scale, zero = tail
        self.tail = key_codes, value_codes, scale, zero

    def read(self) -> tuple[Tensor, Tensor]:
        """All tokens, dequantized: keys (not rotated), values [batch, kv_heads, tokens, head_dim] float32."""
        assert self.tail is not None and self.sink is not None
        parts = [(unpack(block.keys).mT, unpack(block.values), block.scale, block.zero) for block in self.blocks]
        key_codes, value_codes, scale, zero = (torch.cat(part, dim=2) for part in zip(*parts, self.tail, strict=True))
        keys = dequantize(key_codes, self.key_scale[:, None], self.key_zero[:, None], self.key_codebook)
        values = dequantize(value_codes, scale, zero, self.value_codebook)
        keys[:, :, :1], values[:, :, :1] = (part.float() for part in self.sink)
        return keys, values

    def attend(self, query: Tensor) -> Tensor:
        """Attention of the newest queries to everything stored, themselves included, causally.

        query: [batch, query_heads, queries, head_dim], not rotated. Returns the same shape, float32.
        """
        keys, values = self.read()
        positions = torch.arange(keys.shape[2])
        query_positions = positions[-query.shape[2] :]
        keys = apply_rope(keys, positions, self.inverse_frequencies)
        query = apply_rope(query.float(), query_positions, self.inverse_frequencies)
        keys, values = (part.repeat_interleave(query.shape[1] // keys.shape[1], dim=1) for part in (keys, values))
        scores = query @ keys.mT * query.shape[3] ** -0.5
        scores = scores.masked_fill(positions > query_positions[:, None], -torch.inf)
        return scores.softmax(-1) @ values

    @property
    def nbytes(self) -> int:
        """Bytes allocated for tokens."""
        stored = [tensor for block in self.blocks for tensor in block.tensors()] + [*(self.tail or ()), *(self.sink or ())]
        return sum(tensor.untyped_storage().nbytes() for tensor in stored)


def middles(codebook: Tensor) -> Tensor:
    """Half-way between neighboring levels: [levels - 1]."""
    return (codebook[1:] + codebook[:-1]) / 2


def main() -> None:
    torch.manual_seed(0)
    batch, kv_heads, query_heads, tokens, head_dim = 1, 2, 4, 4096, 64
    keys = torch.randn(batch, kv_heads, tokens, head_dim) * torch.linspace(0.2, 3, head_dim)  # channels of different range
    values, query = torch.randn_like(keys), torch.randn(batch, query_heads, 1, head_dim)
    levels = torch.tensor([-1.0, -0.6, -0.33, -0.11, 0.11, 0.33, 0.6, 1.0])  # a calibration learns them
    lower, upper = keys.amin((0, 2)), keys.amax((0, 2))
    frequencies = 1 / 10_000 ** (torch.arange(head_dim // 2) / (head_dim // 2))
    cache = Cache(levels, levels, (upper - lower) / 2, (upper + lower) / 2, frequencies)
    cache.append(keys[:, :, :4000], values[:, :, :4000])  # the prompt at once
    for i in range(4000, tokens):  # then token by token
        cache.append(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    output = cache.attend(query)
    print(f"{8 * cache.nbytes / (keys.numel() + values.numel()):.2f} bits for each element, output {tuple(output.shape)}")


if __name__ == "__main__":
    main()
