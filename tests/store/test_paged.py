"""Pages of an engine's memory: what is read back, and attention over them, against the naive reference."""

import pytest
import torch
from tests.stream_cases import ROPES, quantizer

from narrowkv.attention import naive
from narrowkv.attention.cpu import decode as cpu
from narrowkv.attention.cpu.int16 import AVX2_INT16, INT16, STREAM_KERNELS
from narrowkv.attention.cpu.paged import PagedAttention, StepSequence, StepView
from narrowkv.codec.trellis import KERNELS
from narrowkv.errors import ActivationError, RecipeError
from narrowkv.store import LayerStore
from narrowkv.store.page_layout import PageLayout
from narrowkv.store.paged import PagedLayer
from narrowkv.store.runs import PAGE, NewTokens

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


def append(paged_layer, sequences, keys, values, naive=False):
    """New tokens of sequences: (length before, new, pages) of each."""
    starts, lengths = [0], []
    for before, new, _ in sequences:
        starts.append(starts[-1] + new)
        lengths.append(before + new)
    tokens = NewTokens.of(starts, lengths, [pages for _, _, pages in sequences])
    (paged_layer.append_naive if naive else paged_layer.append)(tokens, keys, values)


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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dim", "rope", "outliers", "heads"),
    [(64, "half", 0.02, 2), (80, "partial", 0.02, 1), (64, "none", 0.0, 3), (16, "interleaved", 0.02, 2)],
)
def test_compiled_pages_are_those_of_plain_torch(kernel, dtype, dim, rope, outliers, heads, monkeypatch):
    monkeypatch.setattr("narrowkv.store.paged.KERNELS", [kernel])
    own = layer(heads, dim, outliers=outliers, rope=rope, dtype=dtype)
    other = PagedLayer(own.quantizers, own.rope, own.memory.clone(), dtype)
    for given in ([(0, 70, [0]), (0, 1, [1])], [(70, 3, [0]), (1, 1, [1])], [(68, 1, [0]), (2, 200, [1, 4])], [(64, 64, [0])]):
        keys, values = (3 * tokens(sum(new for _, new, _ in given), heads, dim)).to(dtype)
        append(own, given, keys, values)
        append(other, given, keys, values, naive=True)
        assert torch.equal(own.memory, other.memory)


def test_tokens_written_again_replace_what_was_there():
    """Rejected drafts of speculative decoding, and whatever a page held for another sequence."""
    own = layer()
    other = PagedLayer(own.quantizers, own.rope, own.memory.clone(), torch.float32)
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
    own = layer()
    other = PagedLayer(own.quantizers, own.rope, own.memory.clone(), torch.float32)
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


def step(own, lengths, tables, queries, *, group=3, window=None, in_pages=False, dtype=torch.float32):
    """As many new tokens of each sequence, whose lengths are without them: their view, queries, keys and values."""
    heads, dim = own.layout.kv_heads, own.layout.head_dim
    ends = [queries * (i + 1) for i in range(len(lengths))]
    sequences = [StepSequence(end - queries, end, length + queries) for end, length in zip(ends, lengths, strict=True)]
    widest = max(len(pages) for pages in tables)
    padded = torch.tensor([[*pages, *[10**6] * (widest - len(pages))] for pages in tables])
    query, keys, values = torch.randn(ends[-1], (group + 2) * heads, dim).to(dtype).split([group * heads, heads, heads], dim=1)
    return StepView(sequences, padded, heads, window, in_pages), query, (keys, values)


def assert_attends(attention, view, query, new, kernel=None, within=1e-5):
    output = torch.full(query.shape, torch.nan, dtype=query.dtype)
    attention.attend(view, query, new, output, kernel)
    for i, (start, stop, _) in enumerate(view.sequences):
        inputs, sequence = attention.inputs(view, i, query, new)
        expected = naive.attend(inputs.with_query(inputs.query.double()), sequence)[0].transpose(0, 1).to(query.dtype)
        torch.testing.assert_close(output[start:stop], expected, atol=within, rtol=within)


def attention_of(own, group=3, **options):
    return PagedAttention(own, group * own.layout.kv_heads, own.layout.head_dim**-0.5, **options)


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("window", [None, 90, 20])
@pytest.mark.parametrize(
    ("dim", "rope", "outliers", "heads"), [(64, "half", 0.02, 2), (80, "partial", 0.02, 1), (16, "none", 0.0, 3)]
)
def test_the_kernel_attends_to_pages(kernel, queries, window, dim, rope, outliers, heads):
    lengths = [63, 700, 64, 200, 1]
    own, tables = filled(lengths, dim=dim, rope=rope, outliers=outliers, heads=heads)
    view, query, new = step(own, lengths, tables, queries, window=window)
    assert len(view.few) == len(lengths)
    assert_attends(attention_of(own), view, query, new, kernel, WITHIN.get(kernel, 1e-5))


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sink_logits": torch.randn(6)}])
def test_scores_that_are_capped_and_sinks_of_the_model(options):
    own, tables = filled([150])
    assert_attends(attention_of(own, **options), *step(own, [150], tables, 1))


@pytest.mark.parametrize("window", [None, 90])
def test_prompts_are_read_as_by_definition(window):
    own, tables = filled([150, 1])
    view, query, new = step(own, [150, 0], tables, 40, window=window)
    assert not view.few
    assert_attends(attention_of(own), view, query, new)


def test_prompts_and_tokens_are_read_in_one_step():
    own, tables = filled([150, 200, 1])
    sequences = [StepSequence(0, 1, 151), StepSequence(1, 41, 240), StepSequence(41, 44, 4)]
    view = StepView(sequences, torch.tensor([[*pages, 0][:2] for pages in tables]), 2)
    assert (view.few, view.many) == ([0, 2], [1])
    assert_attends(attention_of(own), view, torch.randn(44, 6, 64), (torch.randn(44, 2, 64), torch.randn(44, 2, 64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_of_16_bits_are_multiplied_in_int16(dtype):
    own, tables = filled([150, 63], dtype=dtype)
    assert_attends(attention_of(own), *step(own, [150, 63], tables, 3, dtype=dtype), within=2e-2)
    assert attention_of(own).tables.kernel(dtype) == (STREAM_KERNELS or cpu.KERNELS)[0]
    assert attention_of(own).tables.kernel(torch.float32) == cpu.KERNELS[0]


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("queries", [1, 4, 40])
def test_new_tokens_can_be_read_in_pages_too(queries, window):
    own, tables = filled([150, 64])
    assert_attends(attention_of(own), *step(own, [150 - queries, 64 - queries], tables, queries, window=window, in_pages=True))


def test_positions_beyond_the_tables_of_angles_make_longer_ones():
    own, tables = filled([5000])
    attention = attention_of(own)
    for length in (100, 5000):
        assert_attends(attention, *step(own, [length], tables, 1))


def test_pages_that_do_not_exist_are_refused():
    own, tables = filled([150])
    attention = attention_of(own)
    for page in (len(own.memory), -1):
        view, query, new = step(own, [150], [[tables[0][0], page]], 1)
        with pytest.raises(ValueError, match="no such page"):
            attention.attend(view, query, new, torch.empty_like(query))
        with pytest.raises(ValueError, match="no such page"):
            append(own, [(3, 1, [page])], *tokens(1))
