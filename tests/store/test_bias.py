"""What is taken out of keys and values before they are encoded: against the formula, written again."""

import copy

import pytest
import torch

from narrowkv.attention import Rope
from narrowkv.codec import Outliers, Quantization, Scheme, Transform, quantizer_for
from narrowkv.store import LayerStore, PositionBuffer
from narrowkv.store.bias import Bias

SCHEMES = {
    "int4": Scheme(Quantization(4, "int")),
    "hadamard-int4": Scheme(Quantization(4, "int", strategy="token_head"), Transform(hadamard=True)),
    "kivi-2": Scheme(Quantization(2, "int", strategy="channel", group_size=32)),
    "int8 with outliers": Scheme(Quantization(8, "int"), outliers=Outliers(0.02)),
    "iv": Scheme(Quantization(2, "iv", strategy="block", group_size=64)),
    "iv, window of 3": Scheme(Quantization(2, "iv", strategy="block", group_size=64, lookahead_blocks=3)),
}
SHAPES = [
    # batch, kv heads, head_dim, tokens
    pytest.param((1, 1, 80, 63), id="one head, head_dim 80, 63 tokens"),
    pytest.param((3, 2, 16, 200), id="batch 3"),
]


def biased_store(scheme, shape, *, rope=True, **options):
    """A store, keys and values [batch, kv_heads, tokens, head_dim] as a model has them, and positions, which differ by row."""
    batch, heads, dim, tokens = shape
    turning = Rope(1 / 10_000 ** (torch.arange(dim // 4) / (dim // 4)), 1.2)  # rotates half of the channels, and widens them
    positions = (torch.arange(tokens) - 5 * torch.arange(batch)[:, None]).clamp(min=0)
    bias = Bias(100 * torch.randn(heads, dim), 10 * torch.randn(heads, dim))
    if rope:
        bias.rope, bias.position_buffer = turning, PositionBuffer()
    keys, values = (torch.randn(batch, heads, tokens, dim) + part[:, None] for part in bias.tensors())
    keys = turning.rotate(keys, positions) if rope else keys
    quantizers = (quantizer_for(scheme), quantizer_for(scheme))
    store = LayerStore(*quantizers, bias=bias, **({"residual_length": scheme.lookahead_tokens} | options))
    return store, keys, values, positions


def append(store, keys, values, positions, chunks):
    for k, v, at in zip(*(x.split(chunks, -2) for x in (keys, values, positions[..., None])), strict=True):
        if store.bias.position_buffer:
            store.bias.position_buffer.append(at[..., 0])
        store.append(k, v)


def by_formula(store, keys, values, positions):
    """Keys and values that went through the quantizers block by block, less the bias rotated to each token's position."""
    found, quantizer, bias = [], store.quantizers[0], store.bias
    for start in range(0, keys.shape[2], 64):
        for x, of in ((keys[:, :, start : start + 64], bias.keys), (values[:, :, start : start + 64], bias.values)):
            constant = of[None, :, None].expand(len(x), -1, -1, -1)
            if of is bias.keys and bias.rope:
                at = positions[:, start : start + x.shape[2]]
                constant = bias.rope.rotate_precisely(constant.expand(-1, -1, at.shape[1], -1), at).float()
            found.append(quantizer.dequantize(quantizer.encode(x - constant)) + constant)
    return torch.cat(found[::2], 2), torch.cat(found[1::2], 2)


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in SCHEMES if "window" not in name])
def test_every_token_loses_its_own_bias(name, shape, rope):
    scheme = SCHEMES[name]
    store, keys, values, positions = biased_store(scheme, shape, rope=rope)
    append(store, keys, values, positions, shape[3])
    whole = store.packed
    expected = by_formula(store, *(x[:, :, :whole] for x in (keys, values)), positions) if whole else ()
    for found, right, own in zip(store.read(), expected or (keys, values), (keys, values), strict=True):
        torch.testing.assert_close(found[:, :, :whole], right[:, :, :whole], rtol=1e-5, atol=1e-4)
        assert torch.equal(found[:, :, whole:], own[:, :, whole:])


@pytest.mark.parametrize("chunks", [1, 7, 64, [130, 1, 69]])
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_do_not_depend_on_where_chunks_end(name, chunks):
    torch.manual_seed(1)
    first, *elements = biased_store(SCHEMES[name], (2, 2, 16, 200))
    append(first, *elements, 200)
    torch.manual_seed(1)
    second, *elements = biased_store(SCHEMES[name], (2, 2, 16, 200))
    append(second, *elements, chunks)
    for one, two in zip(first.read(), second.read(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)  # a rotated constant may be off by a last bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_precision_tokens_are_bit_exact(dtype):
    store, keys, values, positions = biased_store(SCHEMES["int4"], (2, 2, 16, 200), sinks=3, residual_length=40)
    keys, values = keys.to(dtype), values.to(dtype)
    append(store, keys, values, positions, 200)
    for found, own in zip(store.read(), (keys, values), strict=True):
        for exact in (slice(3), slice(160, None)):
            assert torch.equal(found[:, :, exact], own[:, :, exact].float())
        assert not torch.equal(found[:, :, 3:160], own[:, :, 3:160].float())


def test_subtracting_a_bias_loses_no_precision():
    plain, elements = LayerStore(quantizer_for(SCHEMES["int4"]), quantizer_for(SCHEMES["int4"])), torch.randn(1, 2, 128, 16)
    plain.append(elements, elements)
    expected = (plain.read()[0] - elements).norm()
    bias = Bias(200 * torch.randn(2, 16), 200 * torch.randn(2, 16))
    store = LayerStore(*plain.quantizers, bias=bias)
    store.append(elements + bias.keys[:, None], elements + bias.values[:, None])
    for found, of in zip(store.read(), bias.tensors(), strict=True):
        assert (found - elements - of[:, None]).norm() <= 1.01 * expected
    assert store.parts()["bias"] == bias.tensors()


def test_a_store_that_is_copied_cropped_selected_and_evicts():
    store, keys, values, positions = biased_store(SCHEMES["int4"], (3, 2, 16, 200))
    append(store, keys, values, positions, 200)
    whole = store.read()
    twin, rows = copy.deepcopy(store), torch.tensor([2, 0, 2])
    twin.crop(150)
    twin.bias.position_buffer.crop(150)
    twin.select(rows)
    twin.bias.position_buffer.select(rows)
    twin.evict(100)
    assert twin.first == 64
    for found, before in zip(twin.read(), whole, strict=True):
        torch.testing.assert_close(found, before[rows, :, 64:150], rtol=0, atol=1e-4)
    append(twin, keys[rows, :, 150:], values[rows, :, 150:], positions[rows, 150:], 13)
    for found, own in zip(twin.read(), (keys, values), strict=True):
        assert (found - own[rows, :, 64:]).abs().max() < 40
    for found, before in zip(store.read(), whole, strict=True):
        assert torch.equal(found, before)
