"""The naive attention against torch's own, on the elements that the cache dequantizes to; the tiled one against the naive."""

import pytest
import torch

from narrowkv.attention import AttentionInputs, AttentionMask, Rope, StoredRope, naive, tiled
from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme, Transform
from narrowkv.store import LayerStore

CASES = [
    # batch, query heads, kv heads, head_dim, past, new
    pytest.param(1, 1, 1, 80, 63, 1, id="one head, 63 tokens"),
    pytest.param(3, 6, 2, 16, 100, 1, id="batch 3, groups of 3"),
    pytest.param(2, 4, 4, 8, 64, 5, id="five queries"),
    pytest.param(2, 8, 1, 24, 0, 7, id="no past, one kv head"),
    pytest.param(1, 2, 2, 16, 300, 290, id="more queries than a slice"),
]
PAIRS = Scheme(Quantization(4, "int"), Transform(pre_rope=True)), Scheme(Quantization(3, "int"), outliers=Outliers(0.02))


def reference(query, keys, values, mask, scaling):
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)


def frequencies(dim):
    return 1 / 10_000 ** (torch.arange(dim // 2) / (dim // 2))


@pytest.fixture(params=["naive", "tiled", "small tiles", "fused", "fused, small tiles"])
def attend(request, monkeypatch):
    if request.param == "naive":
        return naive.attend
    monkeypatch.setattr(tiled, "FEW_QUERIES", 0 if "fused" in request.param else 1000)
    if "small" in request.param:
        monkeypatch.setattr("narrowkv.store.sealed.TILE_NUMBERS", 1)
        monkeypatch.setattr(tiled, "KEY_SLICE", 7)
        monkeypatch.setattr(tiled, "QUERY_SLICE", 3)
        monkeypatch.setattr(tiled, "FUSED_SLICE", 70)
    return tiled.attend


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "dim", "past", "new"), CASES)
def test_attention_over_what_is_stored(attend, batch, heads, kv_heads, dim, past, new, padded, window, strict):
    total = past + new
    keys, values = torch.randn(batch, kv_heads, total, dim), torch.randn(batch, kv_heads, total, dim)
    query = torch.randn(batch, heads, new, dim)
    rope = Rope(frequencies(dim))
    positions = torch.arange(total).expand(batch, -1)
    store = LayerStore(*map(Quantizer, PAIRS), sinks=2)
    store.append(keys, values)
    stored_keys, stored_values = store.read()
    stored_keys = rope.rotate(stored_keys, positions)
    if not strict:
        stored_keys[:, :, past:] = rope.rotate(keys[:, :, past:], positions[:, past:])
        stored_values[:, :, past:] = values[:, :, past:]
    padding = torch.ones(batch, total, dtype=torch.bool)
    if padded:
        padding[-1, : total // 3] = False
    at = torch.arange(total)
    mask = (at <= at[past:, None]) & padding[:, None, None, :]
    if window:
        mask = mask & (at > at[past:, None] - window)
        store.evict(past - window + 1)
    inputs = AttentionInputs(
        query=query,
        past=total if strict else past,
        new=None if strict else (rope.rotate(keys[:, :, past:], positions[:, past:]), values[:, :, past:]),
        rope=rope,
        rope_state=positions[:, store.first : total if strict else past],
        mask=AttentionMask(padding if padded else None, window),
        scaling=dim**-0.5,
    )
    found = attend(inputs, store)
    expected = reference(query, stored_keys, stored_values, mask, dim**-0.5)
    seeing = mask.any(-1).expand(batch, heads, new)
    torch.testing.assert_close(found[seeing], expected[seeing], atol=1e-4, rtol=1e-4)
    assert not found[~seeing].any()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rule", [None, lambda b, h, q, k: (k <= q) & (k // 48 == q // 48), lambda b, h, q, k: k <= q + b])
@pytest.mark.parametrize("past", [0, 130])
@pytest.mark.parametrize("few", [0, 16])
def test_tiled_attention_equals_naive_attention(monkeypatch, softcap, sinks, rule, past, few):
    monkeypatch.setattr("narrowkv.store.sealed.TILE_NUMBERS", 1)
    monkeypatch.setattr(tiled, "FEW_QUERIES", few)
    monkeypatch.setattr(tiled, "FUSED_SLICE", 6)
    monkeypatch.setattr(tiled, "QUERY_SLICE", 4)
    monkeypatch.setattr(tiled, "KEY_SLICE", 5)
    batch, heads, dim, new = 3, 2, 24, 11
    keys, values = (torch.randn(batch, heads, past + new, dim) for _ in range(2))
    store = LayerStore(*map(Quantizer, PAIRS))
    store.append(keys, values)
    rope = StoredRope("angles0", "once", interleaved=True)
    angles = torch.rand(batch, past + new, dim // 4)  # half of the channels rotate
    rope_state = rope.keep(None, (angles.cos(), angles.sin()))
    padding = torch.ones(batch, past + new, dtype=torch.bool)
    padding[1, :4] = False
    inputs = AttentionInputs(
        query=torch.randn(batch, 6, new, dim, dtype=torch.float64),
        past=past,
        new=(rope.rotate(keys, rope_state)[:, :, past:], values[:, :, past:]),
        rope=rope,
        rope_state=rope_state[:, :past],
        mask=AttentionMask(padding, rule=rule),
        scaling=0.3,
        softcap=softcap,
        sink_logits=torch.randn(6) if sinks else None,
    )
    torch.testing.assert_close(tiled.attend(inputs, store), naive.attend(inputs, store))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_queries_in_16_bits_are_as_exact_as_attention_in_16_bits(dtype):
    past, new, dim = 700, 50, 64
    keys, values = torch.randn(2, 1, 2, past + new, dim, dtype=dtype)
    store = LayerStore(*map(Quantizer, PAIRS))
    store.append(keys[:, :, :past], values[:, :, :past])
    inputs = AttentionInputs(
        query=torch.randn(1, 8, new, dim, dtype=dtype),
        past=past,
        new=(keys[:, :, past:], values[:, :, past:]),
        rope=Rope(frequencies(dim)),
        rope_state=torch.arange(past)[None],
        mask=AttentionMask(),
        scaling=dim**-0.5,
    )
    found, expected = tiled.attend(inputs, store), naive.attend(inputs, store)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 5e-3 * expected.norm()


def test_a_rope_is_the_same_from_frequencies_and_from_any_table():
    x, positions = torch.randn(2, 3, 9, 16), torch.randint(0, 500, (2, 9))
    for interleaved in (False, True):
        rope = Rope(frequencies(12), 1.5, interleaved)
        expected = rope.rotate(x, positions)
        cos, sin = rope.cos_sin(positions)
        tables = {
            "once": (cos, sin),
            "halves": (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)),
            "repeated": (cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)),
            "complex": torch.complex(cos, sin),
        }
        for layout, table in tables.items():
            stored = StoredRope("angles0", layout, interleaved)
            torch.testing.assert_close(stored.rotate(x, stored.keep(None, table)), expected)
