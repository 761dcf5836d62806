"""Trellis-coded codes: the compiled search against its reference and against other paths, streams against the definition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stream_cases import decode

from narrowkv.codec import trellis
from narrowkv.codec.trellis import (
    KERNELS,
    TrellisTables,
    dequantize,
    dequantize_naive,
    encode,
    encode_compiled,
    encode_naive,
)
from narrowkv.errors import RecipeError

ALONE = [tuple(units * (rate == k) for rate in range(7)) for k in range(1, 7) for units in (1, 16)]
MIXED = [(2, 3, 6, 3, 2, 0, 0), (0, 1, 1, 3, 4, 6, 1), (5, 2, 0, 0, 0, 0, 3), (0, 0, 4, 0, 6, 0, 0), (1, 0, 0, 0, 0, 9, 1)]


def random_tables():
    return TrellisTables(torch.randint(-40, 41, (6, 16), dtype=torch.int8), torch.randint(-23, 24, (6, 16), dtype=torch.int8))


def random_weights(heads, rows, n, top=65536):
    return torch.randint(0, top, (heads, rows, n), dtype=torch.int32).to(torch.uint16)


def full_weights(heads, n):
    return torch.full((heads, 1, n), 65535).to(torch.uint16)


def gaussian(heads, rows, n):
    """Elements as tables of 63 steps expect them."""
    return (torch.randn(heads, rows, n) * 20 * 512).clamp(-32768, 32767).to(torch.int16)


def anything(heads, rows, n):
    return torch.randint(-32768, 32768, (heads, rows, n), dtype=torch.int16)


def extreme(heads, rows, n):
    return torch.tensor([-32768, 32767], dtype=torch.int16)[torch.randint(0, 2, (heads, rows, n))]


def elements_in(counts):
    return 8 * sum(counts[1:])


@pytest.mark.parametrize("draw", [gaussian, anything, extreme])
@pytest.mark.parametrize("counts", ALONE + MIXED, ids=str)
def test_the_compiled_search_is_the_plain_one(draw, counts):
    n, tables = elements_in(counts), random_tables()
    for heads, rows in [(1, 1), (2, 5), *([(3, 63)] if sum(counts) < 16 else [])]:
        elements = draw(heads, rows, n)
        for weights in (random_weights(heads, rows, n), full_weights(heads, n)):
            expected = encode_naive(elements, weights, counts, tables)
            for kernel in KERNELS:
                assert torch.equal(encode_compiled(elements, weights, counts, tables, kernel), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_ties_go_to_the_lowest_state(kernel):
    """Where nothing costs anything, or all states cost the same."""
    counts = (0, 1, 1, 1, 1, 1, 1)
    elements, equal = gaussian(2, 5, 48), TrellisTables(*torch.ones(2, 6, 16, dtype=torch.int8))
    for weight, tables in ((0, random_tables()), (65535, equal)):
        weights = torch.full((2, 1, 48), weight).to(torch.uint16)
        codes = encode_compiled(elements, weights, counts, tables, kernel)
        assert torch.equal(codes, encode_naive(elements, weights, counts, tables)) and not codes.any()
    coarse = TrellisTables(*torch.randint(-1, 2, (2, 6, 16), dtype=torch.int8))  # many states cost the same
    weights = random_weights(2, 5, 48)
    codes = encode_compiled(elements, weights, counts, coarse, kernel)
    assert torch.equal(codes, encode_naive(elements, weights, counts, coarse))


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_views_and_poisoned_output(kernel, monkeypatch):
    counts, tables = (3, 1, 2, 0, 2, 0, 0), random_tables()
    elements, weights = gaussian(63, 6, 40).transpose(0, 1)[::2], random_weights(3, 63, 80)[..., ::2]
    expected = encode_naive(elements.clone(), weights.clone(), counts, tables)
    empty = torch.empty
    for poison in (0, 255):
        monkeypatch.setattr(torch, "empty", lambda *shape, poison=poison, **options: empty(*shape, **options).fill_(poison))
        assert torch.equal(encode_compiled(elements, weights, counts, tables, kernel), expected)


def test_results_do_not_depend_on_threads_or_on_how_many_rows_come_at_once():
    counts, tables = (0, 2, 3, 2, 1, 0, 2), random_tables()
    elements, weights = gaussian(3, 70, 80), random_weights(3, 1, 80)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    heads_per_program = encode(elements, weights, counts, tables)
    torch.set_num_threads(threads)
    singly = torch.cat([encode(elements[:, i : i + 1], weights, counts, tables) for i in range(70)], dim=1)
    assert torch.equal(heads_per_program, singly)


def cost(elements, weights, decoded):
    """What trellis.h says that dequantized elements cost in all."""
    distance = (elements.long() - 512 * decoded.long()).abs()
    return ((2 * distance).clamp(max=65535).square() // 65536 * weights.long() // 65536).sum(-1)


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6).filter(any), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_no_random_stream_costs_less(units, seed):
    """Nor one that differs from that found in its first, or in its last, bits alone."""
    torch.manual_seed(seed)
    counts, tables = (1, *units), random_tables()
    elements, weights = gaussian(1, 1, elements_in(counts)), random_weights(1, 1, elements_in(counts), 4096)
    codes = encode(elements, weights, counts, tables)
    least = cost(elements, weights, decode(codes, counts, tables))
    other = torch.randint(0, 256, (3, 1000, codes.shape[2]), dtype=torch.uint8)
    other[1, :, 1:], other[2, :, :-1] = codes[0, :, 1:], codes[0, :, :-1]
    assert (cost(elements, weights, decode(other, counts, tables)) >= least).all()


def test_the_search_finds_the_cheapest_of_all_streams():
    counts, tables = (0, 1, 0, 0, 0, 0, 0), random_tables()
    elements, weights = gaussian(1, 200, 8), random_weights(1, 200, 8, 4096)
    streams = torch.arange(256, dtype=torch.uint8)[None, :, None]
    every = cost(elements[0, :, None], weights[0, :, None].int(), decode(streams, counts, tables))  # [rows, 256]
    found = encode(elements, weights, counts, tables)
    assert torch.equal(every.amin(-1), every.gather(-1, found[0].long())[:, 0])


def test_elements_before_8_bits_reach_only_states_that_a_stream_can_reach():
    """However dear: the first elements of the lowest rate can cost more than any cost that is distinguished."""
    counts = (0, 1, 0, 0, 0, 0, 0)
    high = torch.full((6, 16), 40, dtype=torch.int8)
    high[:, 0] = -40
    tables = TrellisTables(high, torch.zeros(6, 16, dtype=torch.int8))
    elements = torch.full((1, 1, 8), 40 * 512, dtype=torch.int16)
    weights = full_weights(1, 8)
    for codes in (encode(elements, weights, counts, tables), encode_naive(elements, weights, counts, tables)):
        assert decode(codes, counts, tables).tolist() == [[[-40] * 4 + [40] * 4]]


@pytest.mark.parametrize("counts", [*ALONE, *MIXED], ids=str)
def test_a_stream_is_decoded_as_defined(counts):
    tables = random_tables()
    codes = torch.randint(0, 256, (2, 3, trellis.stream_bytes(counts)), dtype=torch.uint8)
    decoded = decode(codes, counts, tables)
    assert decoded.dtype == torch.int8 and decoded.shape == (2, 3, elements_in(counts))
    for head, row in itertools.product(range(2), range(3)):
        stream = "0" * 8 + "".join(f"{byte:08b}" for byte in codes[head, row].tolist())
        end, rates = 8, [rate for rate, units in enumerate(counts) for _ in range(8 * units)]
        for element, rate in enumerate(filter(None, rates)):
            end += rate
            upper, lower = int(stream[end - 8 : end - 4], 2), int(stream[end - 4 : end], 2)
            assert decoded[head, row, element] == tables.high[rate - 1, upper] + tables.low[rate - 1, lower]


@pytest.mark.parametrize("counts", ALONE + MIXED, ids=str)
def test_compiled_elements_of_streams_are_those_of_levels(counts):
    tables, scales = random_tables(), torch.rand(6, 1)
    codes = torch.randint(0, 256, (3, 2, 63, trellis.stream_bytes(counts) + 1), dtype=torch.uint8)
    levels = tables.entries() * scales
    expected = dequantize_naive(codes, counts, levels)
    steps = decode(codes[..., :-1].flatten(1, 2), counts, tables).view_as(expected)
    assert torch.equal(expected, steps * scales[trellis.rates_of(counts, codes.device) - 1, 0])
    assert torch.equal(dequantize(codes, counts, levels), expected)
    with pytest.raises(RecipeError, match="use the counts that encoded them"):
        dequantize(codes[..., :-2], counts, levels)


def test_representable_elements_round_trip_and_zeros_are_the_first_state():
    counts, tables = (0, 2, 2, 2, 2, 2, 2), random_tables()
    codes = torch.randint(0, 256, (3, 9, trellis.stream_bytes(counts)), dtype=torch.uint8)
    decoded = decode(codes, counts, tables)
    found = encode(decoded.to(torch.int16) * 512, full_weights(3, 96), counts, tables)
    assert torch.equal(decode(found, counts, tables), decoded)
    zeros = decode(torch.zeros_like(codes), counts, tables)
    assert torch.equal(zeros, (tables.high[:, 0] + tables.low[:, 0]).repeat_interleave(16).expand_as(zeros))


def test_empty_streams_round_trip():
    tables = random_tables()
    for heads, rows, counts in ((2, 3, (16, 0, 0, 0, 0, 0, 0)), (2, 0, (0, 1, 0, 0, 0, 0, 0)), (0, 2, (0, 1, 0, 0, 0, 0, 0))):
        elements, weights = gaussian(heads, rows, elements_in(counts)), random_weights(heads, 1, elements_in(counts))
        for find in (encode, encode_naive):
            codes = find(elements, weights, counts, tables)
            assert codes.shape == (heads, rows, trellis.stream_bytes(counts))
            assert decode(codes, counts, tables).shape == elements.shape


def test_tables_that_do_not_fit_are_refused():
    good = torch.zeros(6, 16, dtype=torch.int8)
    for high, low in ((good[:5], good), (good, good.int()), (good + 40, good + 24), (good - 40, good - 24)):
        with pytest.raises(RecipeError, match="calibrate again"):
            TrellisTables(high, low)
    TrellisTables(good + 40, good + 23)


def test_incompatible_options_are_refused_before_anything_is_computed(monkeypatch):
    counts, tables = (0, 1, 1, 0, 0, 0, 0), random_tables()
    elements, weights = gaussian(2, 3, 16), random_weights(2, 1, 16)
    codes = encode(elements, weights, counts, tables)

    def never(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(trellis._kernels, "encode_trellis", never)
    for wrong in (
        (elements[0], weights, counts),
        (elements[..., :8], weights[..., :8], counts),
        (elements.int(), weights, counts),
        (elements, weights.int(), counts),
        (elements, weights[:, :, :8], counts),
        (elements, weights.expand(2, 2, 16), counts),
        (elements, weights, counts[:6]),
        (elements, weights, (0, 3, -1, 0, 0, 0, 0)),
    ):
        with pytest.raises(RecipeError, match=r"^[A-Z][^\n]*\.$"):
            encode(*wrong, tables)
    for wrong in ((codes[0], counts), (codes[..., 1:], counts), (codes.int(), counts), (codes, counts[:6])):
        with pytest.raises(RecipeError, match=r"^[A-Z][^\n]*\.$"):
            decode(*wrong, tables)
