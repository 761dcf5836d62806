"""What appending to the packed cache costs: `python -m benchmarks.encode [--json FILE]`.

One layer of 8 KV heads of 128 channels, keys and values, tables drawn at random as in `benchmarks.attention`. Decoding: one
token at a time behind 8,192 others, the mean of 128, so that two blocks are sealed. Prefill: 2,048 tokens at a time. The peer is
the same store with the twins in plain torch, in the same run: all take turns, and medians are compared. The share is that of one
step of attention over 8,192 tokens (32 query heads), in the same turns.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.attention import HEAD_DIM, KV_HEADS, RECIPES, fill, medians, ours, random_quantizer
from narrowkv import get_recipe
from narrowkv.attention import cpu
from narrowkv.codec import Quantizer, packing, points, ranges
from narrowkv.store import LayerStore

CONTEXT, PREFILL, DECODED = 8192, 2048, 128


@contextmanager
def plain_torch() -> Iterator[None]:
    """Within, every compiled form gives way to its twin."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(Quantizer, "_encoder", None))
        stack.enter_context(patch.object(ranges.compiled, "KINDS", {}))
        stack.enter_context(patch("narrowkv.store.page.pack", packing.pack_naive))
        stack.enter_context(patch.object(points.PointQuantizer, "_nearest", points_naive))
        yield


def points_naive(quantizer: points.PointQuantizer, turned: Tensor) -> tuple[Tensor, Tensor]:
    assert quantizer.points is not None and quantizer.weight is not None
    unit = quantizer.weight.sqrt()
    return points.nearest_naive(turned * points.from_vectors(unit)[:, None], quantizer.points.float() * unit[:, :, None])


def make(name: str) -> LayerStore:
    """An empty store."""
    recipe = get_recipe(name)
    return LayerStore(random_quantizer(recipe.keys), random_quantizer(recipe.values), recipe.sinks, recipe.window)
