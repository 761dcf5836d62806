"""Pages of an engine's memory: what is read back, and attention over them, against the naive reference."""

from dataclasses import replace

import pytest
import torch
from tests.stream_cases import ROPES, quantizer

from narrowkv.attention import AttentionInputs, AttentionMask, naive
from narrowkv.attention.cpu import decode as cpu
from narrowkv.attention.cpu import paged
from narrowkv.attention.cpu.int16 import AVX2_INT16, INT16, STREAM_KERNELS
from narrowkv.errors import ActivationError, RecipeError
from narrowkv.store import LayerStore
from narrowkv.store.paged import PagedLayer, PagedSequence, PageLayout
from narrowkv.store.runs import PAGE, run_groups

FORMS = [*cpu.KERNELS, *STREAM_KERNELS]
WITHIN = {INT16: 2e-3, AVX2_INT16: 2e-3}


def layer(heads=2, dim=64, *, outliers=0.02, rope="half", dtype=torch.float32, pages=9):
    """Pages full of noise, which nobody may read unless it was written."""
    turning = ROPES[rope](dim)
    pair = (
        quantizer(heads, dim, keys=True, outliers=outliers, rope=turning),
        quantizer(heads, dim, keys=False, outliers=outliers),
    )
    nbytes = -(-PageLayout.of(pair, dtype).nbytes // 64) * 64 + 128
    return PagedLayer(pair, turning, torch.randint(256, (pages, nbytes), dtype=torch.uint8), dtype)


def append(paged_layer, sequences, keys, values):
    """New tokens of sequences: (length before, new, pages) of each."""
    starts, lengths = [0], []
    for before, new, _ in sequences:
        starts.append(starts[-1] + new)
        lengths.append(before + new)
    paged_layer.append(run_groups(starts, lengths, [pages for _, _, pages in sequences]), keys, values)


def tokens(length, heads=2, dim=64):
    return torch.randn(2, length, heads, dim)


@pytest.mark.parametrize("chunks", [(63,), (1, 1, 1), (64, 1), (200, 1, 1, 100), (5, 130)])
@pytest.mark.parametrize(
    ("dim", "rope", "outliers"), [(64, "half", 0.02), (80, "partial", 0.0), (64, "none", 0.02), (16, "interleaved", 0.02)]
)
def test_tokens_are_read_back_as_a_store_has_them(chunks, dim, rope, outliers):
    pages, own = [5, 0, 7], layer(dim=dim, rope=rope, outliers=outliers)
    keys, values = tokens(sum(chunks), dim=dim)
    before = 0
    for new in chunks:
        append(own, [(before, new, pages)], keys[before : before + new], values[before : before + new])
        before += new
    turning = own.rope
    store = LayerStore(*own.quantizers, sinks=1)
    exact = keys.transpose(0, 1)[None]
    at = torch.arange(before)[None]
    store.append((exact if turning is None else turning.unrotate(exact, at)).float(), values.transpose(0, 1)[None])
    found = own.dequantize(torch.tensor(pages), 0, before)
    for part, expected in zip(found, store.read(), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_token_is_exact_in_the_dtype_of_the_model(dtype):
    own = layer(dtype=dtype)
    keys, values = tokens(3).to(dtype)
    append(own, [(0, 3, [4])], keys, values)
    found = own.dequantize(torch.tensor([4]), 0, 3)
    for part, given in zip(found, (keys, values), strict=True):
        assert torch.equal(part[0, :, 0], given[0].float())


def test_tokens_written_again_replace_what_was_there():
    """Rejected drafts of speculative decoding, and whatever a page held for another sequence."""
    own, other = layer(), layer()
    other.quantizers, other.rope = own.quantizers, own.rope
    keys, values = tokens(90)
    for new, at in (((90, 0), 0), ((30, 50), 50), ((40, 80), 80)):
        append(own, [(new[1], new[0], [3])], *(torch.randn(2, new[0], 2, 64) if at else (keys, values)))
    append(own, [(50, 40, [3])], keys[50:], values[50:])
    append(other, [(0, 90, [1])], keys, values)
    for part, expected in zip(
        own.dequantize(torch.tensor([3]), 0, 90), other.dequantize(torch.tensor([1]), 0, 90), strict=True
    ):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)


def test_a_block_stores_no_more_outliers_than_its_budget():
    own = layer(outliers=0.01)
    keys, values = tokens(64)
    for i in range(64):
        append(own, [(i, 1, [2])], 20 * keys[i : i + 1], 20 * values[i : i + 1])
    for side in own.layout.sides:
        offsets = own.memory[2, side.offsets : side.values].view(torch.int32)
        assert side.budget > 0 and offsets.diff().tolist() == [side.budget] * 2


def test_sequences_are_written_at_once_as_one_by_one():
    own, other = layer(), layer()
    other.quantizers, other.rope = own.quantizers, own.rope
    given = [(0, 70, [0]), (100, 1, [1]), (130, 1, [2, 3]), (60, 3, [4]), (40, 3, [5])]
    keys, values = tokens(sum(new for _, new, _ in given))
    for one in (own, other):
        one.memory.zero_()
    append(own, given, keys, values)
    start = 0
    for before, new, pages in given:
        append(other, [(before, new, pages)], keys[start : start + new], values[start : start + new])
        start += new
    assert torch.equal(own.memory, other.memory)


def test_pages_that_are_too_small_are_refused():
    own = layer()
    with pytest.raises(RecipeError, match="equal layers"):
        PagedLayer(own.quantizers, own.rope, own.memory[:, :100], torch.float32)


def test_keys_that_are_not_finite_are_refused():
    own = layer()
    keys, values = tokens(2)
    keys[1, 0, 3] = torch.nan
    with pytest.raises(ActivationError):
        append(own, [(0, 2, [0])], keys, values)


def filled(lengths, **options):
    """A layer with sequences of these lengths in pages that are mixed up, and the pages of each."""
    own = layer(pages=sum(-(-length // PAGE) for length in lengths) + 2, **options)
    heads, dim = own.layout.kv_heads, own.layout.head_dim
    free = torch.randperm(len(own.memory)).tolist()
    tables = [[free.pop() for _ in range(-(-length // PAGE))] for length in lengths]
    append(own, [(0, length, pages) for length, pages in zip(lengths, tables, strict=True)], *tokens(sum(lengths), heads, dim))
    return own, tables


def inputs_of(own, length, queries, *, group=3, window=None, dtype=torch.float32, **options):
    heads, dim = own.layout.kv_heads, own.layout.head_dim
    new = torch.randn(2, 1, heads, queries, dim)
    first = 0 if window is None else max(length + 1 - window, 0) // 64 * 64
    at = torch.arange(first, length)[None]
    return AttentionInputs(
        query=torch.randn(1, group * heads, queries, dim).to(dtype),
        past=length,
        new=(new[0], new[1]),
        rope=own.rope,
        rope_state=at,
        mask=AttentionMask(sliding_window=window),
        scaling=dim**-0.5,
        **options,
    ), first


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("window", [None, 90, 20])
@pytest.mark.parametrize(
    ("dim", "rope", "outliers", "heads"), [(64, "half", 0.02, 2), (80, "partial", 0.02, 1), (16, "none", 0.0, 3)]
)
def test_the_kernel_attends_to_pages(kernel, queries, window, dim, rope, outliers, heads):
    lengths = [63, 700, 64, 200, 1]
    own, tables = filled(lengths, dim=dim, rope=rope, outliers=outliers, heads=heads)
    parts = []
    for length, pages in zip(lengths, tables, strict=True):
        inputs, first = inputs_of(own, length, queries, window=window)
        parts.append((inputs, PagedSequence(own, torch.tensor(pages), first)))
    for found, (inputs, sequence) in zip(paged.attend_each(parts, kernel), parts, strict=True):
        expected = naive.attend(inputs.with_query(inputs.query.double()), sequence).float()
        torch.testing.assert_close(found, expected, atol=WITHIN.get(kernel, 1e-5), rtol=WITHIN.get(kernel, 1e-5))


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sink_logits": torch.randn(6)}])
def test_scores_that_are_capped_and_sinks_of_the_model(options):
    own, tables = filled([150])
    inputs, first = inputs_of(own, 150, 1, **options)
    sequence = PagedSequence(own, torch.tensor(tables[0]), first)
    torch.testing.assert_close(
        paged.attend_each([(inputs, sequence)])[0], naive.attend(inputs, sequence), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("past", [0, 150])
def test_prompts_are_read_as_by_definition(past, window):
    own, tables = filled([150])
    inputs, first = inputs_of(own, past, 40, window=window)
    sequence = PagedSequence(own, torch.tensor(tables[0]), first)
    torch.testing.assert_close(
        paged.attend_each([(inputs, sequence)])[0], naive.attend(inputs, sequence), atol=1e-5, rtol=1e-5
    )


def test_queries_of_16_bits_are_multiplied_in_int16():
    own, tables = filled([150])
    inputs, first = inputs_of(own, 150, 1, dtype=torch.bfloat16)
    prepared = paged._prepare(inputs, PagedSequence(own, torch.tensor(tables[0]), first), None)
    assert prepared.kernel == (STREAM_KERNELS or cpu.KERNELS)[0]


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("queries", [1, 4, 40])
def test_new_tokens_can_be_read_in_pages_too(queries, window):
    own, tables = filled([150])
    inputs, first = inputs_of(own, 150 - queries, queries, window=window)
    at = torch.arange(first, 150)[None]
    inputs = replace(inputs, past=150, new=None, rope_state=at)
    sequence = PagedSequence(own, torch.tensor(tables[0]), first)
    torch.testing.assert_close(
        paged.attend_each([(inputs, sequence)])[0], naive.attend(inputs, sequence), atol=1e-5, rtol=1e-5
    )
