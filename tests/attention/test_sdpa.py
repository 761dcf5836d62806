"""Which of torch's fused operators attends to a split, and how it is called; on a CPU, references stand in for those of a
GPU.
"""

from dataclasses import replace

import pytest
import torch
from tests.cases import KEYS, VALUES, assert_attends, case

from narrowkv.attention import AttentionMask, naive, sdpa, tiled


def softmax_of(query, keys, values, bias, scale):
    """Means, and logs of sums, of plain attention in float32."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (side.float().repeat_interleave(group, dim=1) for side in (keys, values))
    scores = query.float() * scale @ keys.mT + bias
    return (scores.softmax(-1) @ values).to(query.dtype), scores.logsumexp(-1)


def flash(query, key, value, dropout_p, is_causal, return_debug_mask, *, scale):
    """The contract of torch's operator: causal as seen from the last key, fewer KV heads than query heads."""
    queries, dim = query.shape[2:]
    assert query.dtype == key.dtype == value.dtype and query.dtype in sdpa.HALVES
    assert dim % 8 == 0 and dim <= 256 and not dropout_p and not return_debug_mask
    assert all(part.stride(-1) == 1 for part in (query, key, value))
    bias = torch.zeros(queries, key.shape[2])
    if is_causal:
        bias[torch.ones_like(bias).triu(1 + key.shape[2] - queries) > 0] = -torch.inf
    mean, log_total = softmax_of(query, key, value, bias, scale)
    seeing = ~bias.isinf().all(-1)
    return (
        mean.masked_fill(~seeing[:, None], 0.0), log_total.masked_fill(~seeing, torch.inf),
        None, None, queries, key.shape[2], None, None, None,
    )  # fmt: skip


def efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, *, scale):
    """The contract of torch's operator: as many KV heads, an aligned mask of every head, sums for a multiple of 32 queries."""
    batch, heads, queries = query.shape[:3]
    assert key.shape[:2] == value.shape[:2] == (batch, heads) and compute_log_sumexp and not dropout_p
    bias = torch.zeros(queries, key.shape[2])
    if attn_bias is not None:
        assert attn_bias.shape == (batch, heads, queries, key.shape[2]) and attn_bias.dtype == query.dtype
        assert attn_bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        assert not attn_bias.isnan().any()
        bias = bias + attn_bias
    if is_causal:
        bias = bias.masked_fill(torch.ones_like(bias).triu(1) > 0, -torch.inf)
    mean, log_total = softmax_of(query, key, value, bias, scale)
    return mean, torch.nn.functional.pad(log_total, (0, -queries % 32), value=torch.inf), None, None


@pytest.fixture
def called(monkeypatch):
    """On a CPU, what would run on a GPU; returns the names of the operators that were called."""
    names = []

    def operator(name):
        names.append(name)
        return {"_scaled_dot_product_flash_attention": flash, "_scaled_dot_product_efficient_attention": efficient}[name]

    monkeypatch.setattr(sdpa, "operator", operator)
    monkeypatch.setattr(sdpa, "device_for", lambda query: "gpu" if query.dtype in sdpa.HALVES else None)
    monkeypatch.setattr(sdpa, "flash_reads", lambda query, keys: query.shape[3] <= 256)
    return names


def check(inputs, store):
    assert_attends(tiled.attend, inputs.with_query(inputs.query.half()), store, 3e-3)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 80, 63, 21), (3, 6, 2, 16, 200, 40), (1, 4, 4, 24, 50, 50)])
def test_a_plain_prompt_takes_flash_attention_and_no_mask(called, shape, sinks):
    inputs, store = case(KEYS["nuq4-1%"], VALUES["kivi-2"], shape)
    check(replace(inputs, mask=AttentionMask(), sink_logits=torch.randn(shape[1]) if sinks else None), store)
    assert set(called) == {"_scaled_dot_product_flash_attention"}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        lambda padding: AttentionMask(padding, 30, batch=3),
        lambda padding: AttentionMask(padding, None, lambda b, h, q, k: (k <= q) & (k // 48 == q // 48), batch=3),
        lambda padding: AttentionMask(padding),
    ],
    ids=["window", "rule", "padding"],
)
def test_where_a_mask_is_needed_the_other_operator_is_taken(called, monkeypatch, mask, small):
    if small:
        monkeypatch.setattr(tiled, "FUSED_SLICE", 19)
        monkeypatch.setattr(tiled, "QUERY_SLICE", 10)
    inputs, store = case(KEYS["nuq2"], VALUES["token"], (3, 4, 2, 16, 200, 45), padded=[0, 70, 190])
    check(replace(inputs, mask=mask(inputs.mask.padding)), store)
    assert "_scaled_dot_product_efficient_attention" in called


def test_a_query_that_sees_nothing_yields_zeros(called):
    inputs, store = case(KEYS["nuq2"], VALUES["token"], (2, 2, 1, 16, 70, 20), padded=[0, 70])
    found = tiled.attend(inputs.with_query(inputs.query.half()), store)
    assert found[0].any() and not found[1].any()


def test_heads_too_long_for_flash_attention(called):
    check(*case(KEYS["int8"], VALUES["int8"], (1, 4, 2, 264, 90, 33)))
    assert set(called) == {"_scaled_dot_product_efficient_attention"}


def test_what_no_operator_computes_materializes_scores(called):
    inputs, store = case(KEYS["nuq2"], VALUES["token"], (1, 2, 1, 16, 70, 20))
    for dtype, softcap in ((torch.float32, None), (torch.float16, 2.0)):
        query = inputs.query.to(dtype)
        some = replace(inputs, query=query, softcap=softcap)
        found, expected = tiled.attend(some, store), naive.attend(some.with_query(query.double()), store)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    assert not called


def test_torch_has_the_operators_and_they_take_what_they_are_given():
    """On the device `meta`, which runs nothing and knows shapes."""
    query = torch.empty(2, 6, 33, 80, dtype=torch.bfloat16, device="meta")
    keys = torch.empty(2, 2, 50, 80, dtype=torch.bfloat16, device="meta")
    mask = torch.empty(2, 1, 33, 56, dtype=torch.bfloat16, device="meta")[..., :50]
    for mean, log_total in (
        sdpa._flash(query, keys, keys, False, 0.1),
        sdpa._efficient(query, keys, keys, False, mask, 0.1),
        sdpa._efficient(query, keys, keys, True, None, 0.1),
    ):
        assert mean.shape == query.shape and mean.dtype == query.dtype
        assert log_total.shape == query.shape[:3] and log_total.dtype == torch.float32


def test_fused_attention_operators_per_device():
    query = torch.empty(1, 2, 20, 16)
    assert sdpa.device_for(query) == "cpu" and not sdpa.flash_reads(query, query)
    assert sdpa.device_for(query.to("meta")) is None
