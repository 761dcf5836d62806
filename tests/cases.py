"""Packed stores of random elements, by recipe, with the inputs of attention over them."""

from dataclasses import replace

import torch

from narrowkv.attention import AttentionInputs, AttentionMask, Rope, StoredRope, naive
from narrowkv.attention.cpu import decode as cpu
from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme, Transform
from narrowkv.store import LayerStore, PositionBuffer
from narrowkv.store.bias import Bias

KEYS = {
    "nuq4-1%": Scheme(Quantization(4, "nuq", strategy="channel"), Transform(pre_rope=True), Outliers(0.01)),
    "nuq3-1%": Scheme(Quantization(3, "nuq", strategy="channel"), Transform(pre_rope=True), Outliers(0.01)),
    "nuq2": Scheme(Quantization(2, "nuq", strategy="channel"), Transform(pre_rope=True)),
    "int8": Scheme(Quantization(8, "int", strategy="channel")),
    "kivi-2": Scheme(Quantization(2, "int", strategy="channel", group_size=32)),
    "kivi-4-g8": Scheme(Quantization(4, "int", strategy="channel", group_size=8), outliers=Outliers(0.01)),
    "token": Scheme(Quantization(4, "int"), Transform(pre_rope=True), Outliers(0.02)),
    "token_head groups": Scheme(Quantization(3, "nf", strategy="token_head", group_size=8)),
    "fp4": Scheme(Quantization(4, "fp", strategy="token_head")),
    "hadamard": Scheme(Quantization(4, "int", strategy="token_head"), Transform(hadamard=True)),
    "exact": Scheme(Quantization(16, "exact"), Transform(pre_rope=True)),
}
VALUES = {name: scheme.with_settings(pre_rope=False) for name, scheme in KEYS.items()}


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


def case(keys, values, shape, *, rope="half", padded=None, biased=False, **options):
    """A store of random elements and the inputs of attention over it: (inputs, store).

    biased: keys and values have a large constant, which the store takes out. options: of `filled`.
    """
    _, _, kv_heads, dim, total, _ = shape
    quantizers = made(keys, kv_heads, dim), made(values, kv_heads, dim)
    kinds = {
        "half": PreciseRope(frequencies(dim // 2)),
        "interleaved": PreciseRope(frequencies(dim // 2), 1.3, interleaved=True),
        "partial": PreciseRope(frequencies(dim // 4)),
        "stored": StoredRope("angles0", "once"),
    }
    turning = kinds[rope]
    valid, rope_state = positions(shape, padded)
    if rope == "stored":
        angles = torch.rand(shape[0], total, dim // 2)
        rope_state = turning.keep(None, (angles.cos(), angles.sin()))
    bias = bias_for(keys, values, kv_heads, dim, turning, rope_state) if biased else None
    return filled(quantizers, shape, turning, rope_state, valid, bias=bias, **options)


def positions(shape, padded):
    """Which tokens count [batch, tokens], None for all, and where in their sequences they are. padded: before the first."""
    batch, total = shape[0], shape[4]
    valid = None if padded is None else torch.arange(total) >= torch.tensor(padded)[:, None]
    found = torch.arange(total) if valid is None else valid.cumsum(1) - 1
    return valid, found.clamp(min=0).expand(batch, -1)


def filled(
    quantizers, shape, rope, rope_state, valid, *, sinks=1, window=0, dtype=torch.float32, elements=torch.randn, bias=None
):
    """A store of random elements and the inputs of attention over it: (inputs, store). rope, rope_state: of all keys."""
    batch, heads, kv_heads, dim, total, new = shape
    past, rotated = total - new, rope is not None and quantizers[0].scheme.transform.pre_rope
    k, v = (elements(batch, kv_heads, total, dim).to(dtype) for _ in range(2))
    if bias is not None:
        k, v = k + bias.key_bias(0, total), v + bias.values[:, None]
    store = LayerStore(*quantizers, sinks=sinks, residual_length=window, bias=bias)
    store.append(k, v, valid)
    exact = k.double() if rope is None else rope.rotate(k.double(), rope_state)
    inputs = AttentionInputs(
        query=torch.randn(batch, heads, new, dim),
        past=past,
        new=(exact[:, :, past:], v[:, :, past:]),
        rope=rope if rotated else None,
        rope_state=rope_state[:, store.first : past] if rotated else None,
        mask=AttentionMask(valid),
        scaling=dim**-0.5,
    )
    return inputs, store


def bias_for(keys, values, kv_heads, dim, rope, rope_state):
    """A large bias of keys stored after the rotary embedding, and of values; rope_state: of all tokens."""
    position_buffer = PositionBuffer()
    position_buffer.append(rope_state)
    key_bias, of_values = (torch.randn(kv_heads, dim) * torch.linspace(0, 100, dim) for _ in range(2))
    assert keys.takes_bias_out and values.takes_bias_out and not keys.transform.pre_rope
    return Bias(key_bias, of_values, rope, position_buffer)


def hide(inputs, store, rule, window, softcap):
    """Attention with tokens hidden by a rule of the mask and a window, which the store forgets by; with a softcap and sink
    logits.
    """
    batch, heads = inputs.query.shape[:2]
    rope_state = inputs.rope_state
    if window:
        first = store.first
        store.evict(inputs.past - window + 1)
        rope_state = rope_state[:, store.first - first :]
    return replace(
        inputs,
        mask=AttentionMask(inputs.mask.padding, window, rule, batch=batch),
        rope_state=rope_state,
        softcap=softcap,
        sink_logits=torch.randn(heads),
    )


def assert_attends(attend, inputs, store, tolerance):
    """A backend finds what the naive reference computes in float64, up to a part of its size."""
    found, expected = attend(inputs, store), naive.attend(inputs.with_query(inputs.query.double()), store)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert (found - expected).norm() <= tolerance * expected.norm()


def assert_alike_on_threads(run):
    """What `run` returns is the same, bit for bit, on one, two and three threads."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run())
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def assert_as_one_by_one(parts, kernel):
    """The compiled attention of several (inputs, store) in one call is, bit for bit, that of each alone, on any threads."""
    expected = torch.cat([cpu.attend(*part, kernel=kernel).flatten() for part in parts])

    def together():
        return torch.cat([found.flatten() for found in cpu.attend_each(parts, kernel)])

    assert_alike_on_threads(together)
    assert torch.equal(together(), expected)
