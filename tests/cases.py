"""Packed stores of random elements, by recipe, with the arguments of attention over them."""

from dataclasses import replace

import torch

from narrowkv.attention import AttentionMask, Rope, StoredRope
from narrowkv.codec import Quantizer, Scheme
from narrowkv.store import LayerStore, PositionBuffer
from narrowkv.store.bias import Bias

KEYS = {
    "nuq4-1%": Scheme(4, "nuq", strategy="channel", pre_rope=True, outliers=0.01),
    "nuq3-1%": Scheme(3, "nuq", strategy="channel", pre_rope=True, outliers=0.01),
    "nuq2": Scheme(2, "nuq", strategy="channel", pre_rope=True),
    "int8": Scheme(8, "int", strategy="channel"),
    "kivi-2": Scheme(2, "int", strategy="channel", group_size=32),
    "kivi-4-g8": Scheme(4, "int", strategy="channel", group_size=8, outliers=0.01),
    "token": Scheme(4, "int", pre_rope=True, outliers=0.02),
    "token_head groups": Scheme(3, "nf", strategy="token_head", group_size=8),
    "fp4": Scheme(4, "fp", strategy="token_head"),
    "hadamard": Scheme(4, "int", strategy="token_head", hadamard=True),
    "exact": Scheme(16, "exact", pre_rope=True),
}
VALUES = {name: replace(scheme, pre_rope=False) for name, scheme in KEYS.items()}


class PreciseRope(Rope):
    """Angles in float64: rounded to float32 they are off by as much as positions are large."""

    def cos_sin(self, rope_state, precise=True):
        angles = rope_state[..., None].double() * self.inverse_frequencies.double()
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def made(scheme, heads, dim):
    """A quantizer of a scheme, with tables drawn at random where it needs any."""
    if not scheme.needs_calibration:
        return Quantizer(scheme)
    scale = torch.rand(heads, dim) * 3 + 0.5
    zero = torch.randn(heads, dim)
    codebook = torch.linspace(-1, 1, 2**scheme.code_bits) ** 3 if scheme.datatype == "nuq" else None
    if not scheme.static:
        return Quantizer(scheme, codebook=codebook)
    return Quantizer(scheme, codebook=codebook, scale=scale, zero=zero, lower=zero - 2 * scale, upper=zero + 2 * scale)


def frequencies(pairs):
    return 1 / 10_000 ** (torch.arange(pairs) / pairs)


def case(
    keys,
    values,
    shape,
    *,
    sinks=1,
    window=0,
    rope="half",
    padded=None,
    dtype=torch.float32,
    elements=torch.randn,
    biased=False,
):
    """A store of random elements and the arguments of attention over it: (query, store, options).

    biased: keys and values have a large constant, which the store takes out.
    """
    batch, heads, kv_heads, dim, total, new = shape
    quantizers = made(keys, kv_heads, dim), made(values, kv_heads, dim)
    k, v = (elements(batch, kv_heads, total, dim).to(dtype) for _ in range(2))
    valid = None if padded is None else torch.arange(total) >= torch.tensor(padded)[:, None]
    past = total - new
    positions = (torch.arange(total) if valid is None else valid.cumsum(1) - 1).clamp(min=0).expand(batch, -1)
    kinds = {
        "half": PreciseRope(frequencies(dim // 2)),
        "interleaved": PreciseRope(frequencies(dim // 2), 1.3, interleaved=True),
        "partial": PreciseRope(frequencies(dim // 4)),
        "stored": StoredRope("angles0", "once"),
    }
    turning = kinds[rope]
    rope_state = positions
    if rope == "stored":
        angles = torch.rand(batch, total, dim // 2)
        rope_state = turning.keep(None, (angles.cos(), angles.sin()))
    bias = Bias()
    if biased:
        bias = bias_for(keys, values, kv_heads, dim, turning, rope_state)
        k, v = k + bias.key_bias(0, total), v + bias.values[:, None]
    store = LayerStore(*quantizers, sinks=sinks, residual_length=window, bias=bias)
    store.append(k, v, valid)
    options = {
        "past": past,
        "new": (turning.rotate(k.double(), rope_state)[:, :, past:], v[:, :, past:]),
        "rope": turning if keys.pre_rope else None,
        "rope_state": rope_state[:, store.first : past] if keys.pre_rope else None,
        "mask": AttentionMask(valid),
        "scaling": dim**-0.5,
    }
    return torch.randn(batch, heads, new, dim), store, options


def bias_for(keys, values, kv_heads, dim, rope, rope_state):
    """A large bias of keys stored after the rotary embedding, and of values; rope_state: of all tokens."""
    position_buffer = PositionBuffer()
    position_buffer.append(rope_state)
    key_bias, of_values = (torch.randn(kv_heads, dim) * torch.linspace(0, 100, dim) for _ in range(2))
    assert keys.takes_bias_out and values.takes_bias_out and not keys.pre_rope
    return Bias(key_bias, of_values, rope, position_buffer)


def hide(query, store, options, rule, window, softcap):
    """Hide tokens of a case by a rule of the mask and a window, which the store forgets by; add a softcap and sink logits."""
    options["mask"] = AttentionMask(options["mask"].padding, window, rule, batch=len(query))
    options |= {"softcap": softcap, "sink_logits": torch.randn(query.shape[1])}
    if window:
        first = store.first
        store.evict(options["past"] - window + 1)
        options["rope_state"] = options["rope_state"][:, store.first - first :]


def assert_alike_on_threads(run):
    """What `run` returns is the same, bit for bit, on one, two and three threads."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run())
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
