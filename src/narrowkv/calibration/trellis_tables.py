"""Tables of a trellis learned on a layer's own coefficients."""

import torch
from torch import Tensor

from narrowkv.codec import TrellisQuantizer, trellis

PRIOR = 2e-3  # of an average entry's weight: where little falls, an entry stays about where it is
ITERATIONS = 40


def learned_tables(quantizer: TrellisQuantizer, tables: Tensor, x: Tensor) -> Tensor:
    """One step of Lloyd's: entries move to the weighted means of what falls to them.

    tables: [rates, 2, 16] float32, what the high and the low 4 bits of a window add up to, which stays in float32 while the
    search goes by those on the grid. x: [1, kv_heads, n, head_dim]. Returns tables of the same shape.
    """
    assert quantizer.scheme.quantization.counts is not None
    coefficients, states, weight = assigned(quantizer, x)
    rates, found = trellis.rates_of(quantizer.scheme.quantization.counts, x.device), tables.clone()
    for rate in rates.unique().tolist():
        state, z, w = (part[..., rates == rate].flatten() for part in (states.long(), coefficients, weight))
        counts = torch.bincount(state, weights=w, minlength=trellis.STATES).float()
        sums = torch.bincount(state, weights=z * w, minlength=trellis.STATES).float()
        before = (tables[rate - 1, 0][:, None] + tables[rate - 1, 1]).flatten()
        prior = (PRIOR * counts.sum() / trellis.STATES).clamp(min=torch.finfo(torch.float32).tiny)
        found[rate - 1] = additive((sums + prior * before) / (counts + prior), counts + prior)
    return found


def assigned(quantizer: TrellisQuantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients, the states that they fall to (uint8) and what an error there costs: [1, kv_heads, n, coefficients] each.

    Outliers count like others, so that codes reach what is out of a block's budget of outliers.
    """
    assert quantizer.scheme.quantization.counts is not None and quantizer.weight is not None
    coefficients, norm = quantizer.coefficients(x.detach())
    stream = quantizer.search(coefficients)
    weight = (quantizer.norm_of(norm).square() * quantizer.weight[:, None]).expand_as(coefficients)
    states = trellis.states(stream.flatten(0, 1), quantizer.scheme.quantization.counts).unflatten(0, stream.shape[:2])
    return coefficients, states, weight


def additive(table: Tensor, counts: Tensor) -> Tensor:
    """The nearest table of the form high[upper 4 bits] + low[lower 4 bits]: [2, 16].

    table, counts: entries, and what they weigh, [256].
    """
    size = trellis.NIBBLE
    table, counts = table.view(size, size), counts.view(size, size)
    high = low = torch.zeros_like(table[0])
    for _ in range(ITERATIONS):
        low = ((table - high[:, None]) * counts).sum(0) / counts.sum(0)
        high = ((table - low) * counts).sum(1) / counts.sum(1)
    return torch.stack([high, low])


def on_grid(tables: Tensor) -> tuple[Tensor, Tensor]:
    """Tables [rates, 2, 16] in whole steps, int8, with sums of at most 63 steps; and the steps [rates] float32."""
    high, low = tables.unbind(1)
    middle = (low.amax(1) + low.amin(1)) / 2
    high, low = high + middle[:, None], low - middle[:, None]
    largest = (high[:, :, None] + low[:, None]).abs().amax((1, 2))
    steps = largest.clamp(min=torch.finfo(torch.float32).tiny) / (trellis.TOP - 1)  # both parts are rounded
    entries = (torch.stack([high, low], dim=1) / steps[:, None, None]).round()
    return entries.to(torch.int8), steps
