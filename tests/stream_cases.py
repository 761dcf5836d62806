"""Stores of trellis-coded streams with tables drawn at random, and the inputs of attention over them."""

import torch

from narrowkv.calibration.trellis_fit import in_bytes
from narrowkv.codec import Outliers, Quantization, Scheme, Transform, TrellisQuantizer
from narrowkv.codec.frames import Frames, index_dtype
from narrowkv.codec.gaussian_tables import STEPS, gaussian_tables
from narrowkv.codec.trellis import rates_of, states
from tests.cases import PreciseRope, filled, frequencies, made, positions

COUNTS = {16: (0, 1, 0, 1, 0, 0, 0), 80: (2, 3, 2, 1, 1, 0, 1), 64: (1, 1, 1, 1, 1, 1, 2), 512: (60, 1, 0, 1, 1, 0, 1)}
ROPES = {
    "half": lambda dim: PreciseRope(frequencies(dim // 2)),
    "interleaved": lambda dim: PreciseRope(frequencies(dim // 2), 1.3, interleaved=True),
    "partial": lambda dim: PreciseRope(frequencies(dim // 4), 0.7),
    "none": lambda dim: None,
}


def quantizer(heads, dim, *, keys, learned_rotation=False, outliers=0.0, rope=None):
    """Tables drawn at random; without `keys` those of values, which have norms."""
    counts = COUNTS[dim]
    scheme = Scheme(
        Quantization(3, "trellis", strategy="channel", counts=counts, token_norm=not keys),
        Transform(pre_rope=keys, learned_rotation=learned_rotation),
        Outliers(outliers),
    )
    n, universal = scheme.outlier_positions(dim), gaussian_tables()
    tables = {
        "mean": (torch.randn(heads, dim) / 2).half(),
        "entries": torch.stack([universal.high, universal.low], dim=1)[None],
        "steps": torch.tensor(STEPS),
        "scales": 1.1 * torch.tensor(STEPS),
        "weight": (torch.rand(heads, n) * 3000 + 500).bfloat16(),
        "outlier_threshold": torch.tensor([1500.0]) if outliers else None,
    }
    if learned_rotation:
        tables |= in_bytes(torch.linalg.qr(torch.randn(heads, dim, dim).double()).Q[:, :n])
    else:
        tables["pairs"] = (0.3 * torch.randn(heads, dim // 2, 2, 2) + torch.eye(2)).half()
        tables["order"] = torch.stack([torch.randperm(dim)[:n] for _ in range(heads)]).to(index_dtype(dim))
    if keys:
        tables |= vars(Frames.of(dim) if rope is None else Frames.of(dim, rope.inverse_frequencies, rope.interleaved))
    return TrellisQuantizer(scheme, **tables)


def case(shape, *, learned_rotation=False, outliers=0.02, rope="half", padded=None, keys=None, values=None, **options):
    """A store of streams and the inputs of attention over it: (inputs, store); keys, values: other schemes."""
    _, _, kv_heads, dim, _, _ = shape
    turning = ROPES[rope](dim)
    quantizers = (
        made(keys, kv_heads, dim) if keys else quantizer(kv_heads, dim, keys=True, outliers=outliers, rope=turning),
        made(values, kv_heads, dim)
        if values
        else quantizer(kv_heads, dim, keys=False, learned_rotation=learned_rotation, outliers=outliers),
    )
    valid, rope_state = positions(shape, padded)
    return filled(quantizers, shape, turning, rope_state, valid, **options)


def decode(codes, counts, tables):
    """What streams stand for, in grid steps, by their definition: [heads, rows, n] int8; codes: [heads, rows, bytes] uint8."""
    return tables.entries().to(torch.int8)[rates_of(counts, codes.device) - 1, states(codes, counts)]
