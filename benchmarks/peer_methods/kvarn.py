"""KVarN (arXiv 2606.03458, dual scaling; huawei-csl/KVarN): tiles of 128 tokens whose channels and tokens get even variances.

Hadamard rotation of channels; 16 rounds of dividing a tile by the standard deviations of its tokens and channels in turn, of
which the round with the least imbalance is stored; then uniform codes, keys by channel and values by token. Scales of 16 bits
for both axes and a zero point for one. Published with an exact first tile and an exact tail until its tile is full.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peer_methods.base import HALF, TINY, Pair, Quantizer, Statistics, hadamard, stored

TILE, ROUNDS = 128, 16
LEAST_STD, MOST_STD = 1e-3, 1e3
LEAST_LOG, MOST_LOG = -0.3, 10.0


def imbalance(tile: Tensor) -> Tensor:
    """[n]: how far the standard deviations of columns and of rows of tiles [n, rows, columns] lie apart."""
    columns, rows = tile.std(1), tile.std(2)
    return columns.amax(1) / columns.amin(1).clamp_min(1e-8) + rows.amax(1) / rows.amin(1).clamp_min(1e-8)


def variance_scales(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of columns [n, 1, columns] and of rows [n, rows, 1] that even the variances of tiles [n, rows, columns]."""
    logs = [tile.new_zeros(len(tile), 1, tile.shape[2]), tile.new_zeros(len(tile), tile.shape[1], 1)]
    rope_state, least = [log.exp() for log in logs], imbalance(tile)
    even = tile
    for _ in range(ROUNDS):
        for axis in (0, 1):
            spread = even.std(axis + 1, keepdim=True).clamp(LEAST_STD, MOST_STD)
            logs[axis] = (logs[axis] + spread.log()).clamp(LEAST_LOG, MOST_LOG)
            even = tile / logs[0].exp() / logs[1].exp()
        found = imbalance(even)
        better = (found <= least)[:, None, None]
        rope_state = [torch.where(better, log.exp(), scale) for log, scale in zip(logs, rope_state, strict=True)]
        least = torch.minimum(found, least)
    return rope_state[0], rope_state[1]


def quantize(tile: Tensor, width: int) -> Tensor:
    """Tiles [n, rows, columns] with codes between the extremes of each row."""
    columns, rows = variance_scales(tile)
    even = tile / columns / rows
    low = even.amin(2, keepdim=True)
    scale = ((even.amax(2, keepdim=True) - low) / (2**width - 1)).clamp_min(TINY)
    codes = ((even - low) / scale).round().clamp(0, 2**width - 1)
    return (codes * stored(rows * scale) + stored(rows * low)) * stored(columns)


@dataclass(frozen=True)
class Tiles(Quantizer):
    """Keys, whose rows are channels, or values, whose rows are tokens. A tile has two tokens or more."""

    width: int
    by_channel: bool

    def __call__(self, x: Tensor) -> Tensor:
        rotation = hadamard(x.shape[-1])
        tiles = [tile.mT if self.by_channel else tile for tile in (x @ rotation).split(TILE, 1)]
        decoded = [quantize(tile, self.width) for tile in tiles]
        return torch.cat([tile.mT if self.by_channel else tile for tile in decoded], 1) @ rotation

    def bits(self, kv_heads: int, head_dim: int) -> float:
        along, across = (TILE, head_dim) if self.by_channel else (head_dim, TILE)
        return self.width + 2 * HALF / along + HALF / across


def fit(statistics: Statistics, keys: int, values: int) -> Pair:
    """Both sides of a layer; nothing is learned."""
    return Tiles(keys, by_channel=True), Tiles(values, by_channel=False)
