"""The naive attention against torch's own, on the numbers that the cache decodes to."""

import pytest
import torch

from narrowkv.attention import Rope, naive
from narrowkv.codec import Quantizer, Scheme
from narrowkv.store import LayerStore

CASES = [
    # batch, query heads, kv heads, head_dim, past, new
    pytest.param(1, 1, 1, 80, 63, 1, id="one head, 63 tokens"),
    pytest.param(3, 6, 2, 16, 100, 1, id="batch 3, groups of 3"),
    pytest.param(2, 4, 4, 8, 64, 5, id="five queries"),
    pytest.param(2, 8, 1, 24, 0, 7, id="no past, one kv head"),
    pytest.param(1, 2, 2, 16, 300, 290, id="more queries than a slice"),
]


def reference(query, keys, values, visible, scaling):
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scaling)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "dim", "past", "new"), CASES)
def test_attention_over_what_is_stored(batch, heads, kv_heads, dim, past, new, padded, window, strict):
    total = past + new
    keys, values = torch.randn(batch, kv_heads, total, dim), torch.randn(batch, kv_heads, total, dim)
    query = torch.randn(batch, heads, new, dim)
    rope = Rope(1 / 10_000 ** (torch.arange(dim // 2) / (dim // 2)))
    positions = torch.arange(total).expand(batch, -1)
    store = LayerStore(Quantizer(Scheme(4, "int", pre_rope=True)), Quantizer(Scheme(3, "int", outliers=0.02)), sinks=2)
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
    visible = (at <= at[past:, None]) & padding[:, None, None, :]
    if window:
        visible = visible & (at > at[past:, None] - window)
    found = naive.attend(
        query,
        store,
        past=total if strict else past,
        new=None if strict else (rope.rotate(keys[:, :, past:], positions[:, past:]), values[:, :, past:]),
        rope=rope,
        positions=positions[:, : total if strict else past],
        padding=padding if padded else None,
        scaling=dim**-0.5,
        sliding_window=window,
    )
    expected = reference(query, stored_keys, stored_values, visible, dim**-0.5)
    seeing = visible.any(-1).expand(batch, heads, new)
    torch.testing.assert_close(found[seeing], expected[seeing], atol=2e-5, rtol=1e-4)
    assert not found[~seeing].any()
