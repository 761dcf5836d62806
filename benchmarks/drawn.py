"""What the benchmarks of one layer share: a store of 8 KV heads of 128 channels with tables and numbers drawn at random."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from narrowkv import get_recipe
from narrowkv.codec import AnyQuantizer, Encoded, Quantizer, Scheme, quantizer_for
from narrowkv.store import LayerStore

QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def random_quantizer(scheme: Scheme) -> AnyQuantizer:
    """A scheme with tables that fit normal numbers about as learned ones would."""
    levels = 2**scheme.code_bits
    if scheme.codebook != "layer":
        codes = HEAD_DIM // scheme.numbers
        turn = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM)).Q.half() if scheme.turn else None
        return quantizer_for(
            scheme,
            points=torch.randn(KV_HEADS, codes, levels, scheme.numbers).half(),
            weight=torch.ones(KV_HEADS, codes, scheme.numbers),
            limit=torch.ones(1) if scheme.outliers else None,
            turn=turn,
        )
    tables: dict[str, Tensor] = {}
    if scheme.datatype == "nuq":
        tables["codebook"] = torch.linspace(-1, 1, levels)
    if scheme.static:
        tables["zero"] = torch.zeros(KV_HEADS, HEAD_DIM)
        tables["upper"] = torch.full((KV_HEADS, HEAD_DIM), 2.576)  # 1% of normal numbers lie beyond
        tables["scale"], tables["lower"] = tables["upper"], -tables["upper"]
    return Quantizer(scheme, **tables)


def draw_codes(scheme: Scheme, x: Tensor, skip: Tensor | None = None) -> Encoded:
    """Codes at random, in place of the nearest points."""
    codes = HEAD_DIM // scheme.numbers
    return Encoded(torch.randint(2**scheme.code_bits, (*x.shape[:3], codes), dtype=torch.uint8))


@contextlib.contextmanager
def draw_at_random(store: LayerStore) -> Iterator[None]:
    """Within, points are not searched for: codes of pairs are drawn."""
    searching = [quantizer for quantizer in store.quantizers if quantizer.scheme.codebook != "layer"]
    for quantizer in searching:
        object.__setattr__(quantizer, "encode", functools.partial(draw_codes, quantizer.scheme))
    yield
    for quantizer in searching:
        object.__delattr__(quantizer, "encode")


def fill(name: str, tokens: int, batch: int = 1) -> LayerStore:
    """A store with random numbers."""
    recipe = get_recipe(name)
    store = LayerStore(random_quantizer(recipe.keys), random_quantizer(recipe.values), recipe.sinks, recipe.window)
    with draw_at_random(store):
        for start in range(0, tokens, 4096):
            chunk = torch.randn(2, batch, KV_HEADS, min(4096, tokens - start), HEAD_DIM)
            store.append(chunk[0], chunk[1])
    return store
