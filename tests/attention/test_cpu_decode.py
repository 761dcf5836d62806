"""The compiled attention against the naive reference in float64: every form of block, odd shapes, adversarial elements."""

import copy
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cases import KEYS, VALUES, assert_alike_on_threads, assert_as_one_by_one, assert_attends, case, hide

from narrowkv.attention import AttentionMask
from narrowkv.attention.cpu import decode as cpu
from narrowkv.attention.cpu.tables import RotationTables
from narrowkv.errors import UnsupportedModelError

SHAPES = [
    # batch, query heads, kv heads, head_dim, tokens, new
    pytest.param((1, 1, 1, 80, 65, 1), id="one head, 65 tokens"),
    pytest.param((3, 6, 2, 8, 130, 1), id="batch 3, groups of 3, head_dim 8"),
    pytest.param((1, 4, 1, 128, 700, 5), id="one KV head, 700 tokens, five queries"),
]


def check(inputs, store, kernel=cpu.KERNELS[0], tolerance=1e-5):
    tolerance = 2e-3 if kernel == cpu.INT16 else tolerance
    assert_attends(partial(cpu.attend, kernel=kernel), inputs, store, tolerance)


@pytest.mark.parametrize("kernel", cpu.KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keys", KEYS)
def test_every_form_of_keys(keys, shape, kernel):
    check(*case(KEYS[keys], VALUES["token"], shape), kernel)


@pytest.mark.parametrize("kernel", cpu.KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", VALUES)
def test_every_form_of_values(values, shape, kernel):
    check(*case(KEYS["nuq4-1%"], VALUES[values], shape), kernel)


@pytest.mark.parametrize("kernel", cpu.KERNELS)
@pytest.mark.parametrize("rope", ["interleaved", "partial", "stored"])
def test_every_rotary_embedding(rope, kernel):
    check(*case(KEYS["nuq3-1%"], VALUES["nuq2"], (2, 4, 2, 32, 200, 2), rope=rope), kernel)


@pytest.mark.parametrize("kernel", cpu.KERNELS)
@pytest.mark.parametrize("length", [64, 96, 256])
def test_every_length_of_a_row_of_codes(length, kernel):
    for name in ("nuq3-1%", "nuq2", "kivi-2"):
        check(*case(KEYS[name], VALUES["token_head groups"], (1, 2, 1, length, 140, 1)), kernel)
        check(*case(KEYS["token"], VALUES[name], (1, 2, 1, length, 140, 1)), kernel)


@pytest.mark.parametrize("group", [1, 2, 5, 16])
def test_groups_of_query_heads(group):
    check(*case(KEYS["nuq4-1%"], VALUES["kivi-4-g8"], (2, 2 * group, 2, 16, 150, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["exact", "nuq4-1%"])
def test_elements_stored_in_16_bits(name, dtype):
    check(*case(KEYS[name], VALUES[name], (2, 4, 2, 80, 150, 1), dtype=dtype))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("rule", [None, lambda b, h, q, k: (k <= q) & (k // 48 == q // 48), lambda b, h, q, k: k <= q + b])
def test_masks_padding_and_windows(rule, window, softcap):
    inputs, store = case(KEYS["nuq4-1%"], VALUES["token"], (3, 6, 2, 24, 300, 7), sinks=3, padded=[0, 150, 290])
    inputs = hide(inputs, store, rule, window, softcap)
    check(inputs, store)


def test_a_query_that_sees_nothing_yields_zeros():
    inputs, store = case(KEYS["nuq2"], VALUES["token"], (2, 2, 1, 16, 100, 1), padded=[0, 100])
    found = cpu.attend(inputs, store)
    assert found[0].any() and not found[1].any()


@pytest.mark.parametrize("elements", ["one huge", "all equal", "small and large"])
def test_adversarial_elements(elements):
    def draw(*shape):
        x = torch.randn(shape)
        if elements == "all equal":
            return torch.ones(shape)
        if elements == "one huge":
            x[:, :, shape[2] // 3] *= 300
            return x
        return x * 10.0 ** torch.linspace(-4, 3, shape[3])

    for keys in ("nuq4-1%", "token", "kivi-2"):
        check(*case(KEYS[keys], VALUES["token"], (1, 4, 2, 32, 300, 1), elements=draw))


def test_a_cache_as_it_grows_is_cropped_selected_and_strict():
    keys, values = KEYS["nuq3-1%"], VALUES["kivi-2"]
    inputs, store = case(keys, values, (3, 4, 2, 16, 330, 1), sinks=2, window=40)
    check(inputs, store)
    check(replace(inputs, past=330, new=None, rope_state=torch.arange(330).expand(3, -1)), store)
    store.crop(201)
    inputs = replace(inputs, past=201, new=None, rope_state=torch.arange(201).expand(3, -1))
    check(inputs, store)
    store.select(torch.tensor([2, 0, 2]))
    check(inputs, store)
    store.append(torch.randn(3, 2, 100, 16), torch.randn(3, 2, 100, 16))
    check(replace(inputs, past=301, rope_state=torch.arange(301).expand(3, -1)), store)


ALL_KERNELS = [*cpu.KERNELS, *([cpu.INT16] if cpu.INT16 in cpu.STREAM_KERNELS else [])]


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize("name", ["nuq4-1%", "nuq3-1%", "kivi-2"])
def test_a_tail_that_grew_token_by_token_holds_nothing_that_was_not_written(name, kernel):
    inputs, store = case(KEYS[name], VALUES["token"], (3, 4, 2, 64, 129, 1), sinks=2)
    for _ in range(3 if store.tokens_per_group == 1 else 32):
        store.append(torch.randn(3, 2, 1, 64), torch.randn(3, 2, 1, 64))
    past = store.length
    rope_state = torch.arange(past).expand(3, -1) if inputs.rope else None
    inputs = replace(inputs, past=past, rope_state=rope_state, mask=AttentionMask(), new=None)
    check(inputs, store, kernel)
    expected = cpu.attend(inputs, store, kernel)
    for buffer in store.tail.buffers:
        buffer.codes[:, :, store.tail.tokens :] = 255
        for part in buffer.ranges.values():
            part[:, :, -(-store.tail.tokens * part.shape[2] // 64) :] = torch.nan
    assert torch.equal(cpu.attend(inputs, store, kernel), expected)


@pytest.mark.parametrize("name", ["exact", "nuq2"])
def test_a_tail_of_exact_elements_holds_nothing_that_was_not_written(name):
    inputs, store = case(KEYS["exact"], VALUES[name], (2, 4, 2, 16, 100, 1), dtype=torch.bfloat16)
    expected = cpu.attend(inputs, store)
    store.tail.buffers[0].codes[:, :, store.tail.tokens :] = torch.nan
    assert torch.equal(cpu.attend(inputs, store), expected)


def test_outliers_of_a_tail_in_any_order_and_of_no_head():
    inputs, store = case(KEYS["nuq4-1%"], VALUES["nuq3-1%"], (2, 4, 2, 64, 120, 1))
    expected = cpu.attend(inputs, store)
    buffer = store.tail.buffers[0]
    assert buffer.outliers > 10
    order = torch.randperm(buffer.outliers)
    for part in (buffer.outlier_index, buffer.outlier_values):
        part[: buffer.outliers] = part[order]
    assert torch.equal(cpu.attend(inputs, store), expected)
    buffer.outlier_index[: buffer.outliers] += 2**40
    none_there = cpu.attend(inputs, store)
    buffer.outliers = 0
    assert torch.equal(cpu.attend(inputs, store), none_there)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_exact_tokens_are_read_wherever_they_lie(dtype):
    inputs, store = case(KEYS["nuq2"], VALUES["nuq2"], (2, 4, 2, 24, 200, 3), sinks=3, window=70, dtype=dtype)
    new = tuple(part.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for part in inputs.new)
    check(replace(inputs, new=new), store)
    channels_apart = tuple(part.transpose(2, 3).contiguous().transpose(2, 3) for part in new)
    assert torch.equal(cpu.attend(replace(inputs, new=channels_apart), store), cpu.attend(replace(inputs, new=new), store))


def test_plans_of_a_store_follow_its_blocks_and_are_freed_with_it():
    inputs, store = case(KEYS["nuq3-1%"], VALUES["kivi-2"], (2, 4, 2, 16, 200, 1), sinks=2)
    expected = cpu.attend(inputs, store)
    blocks, rotation = store.plans.get(cpu.PackedBlocks), inputs.rope.plans.get(RotationTables)
    assert torch.equal(cpu.attend(inputs, store), expected)
    assert store.plans.get(cpu.PackedBlocks) is blocks and inputs.rope.plans.get(RotationTables) is rotation
    assert store.plans.nbytes >= blocks.table.nbytes + 4 * 2 * 16 * 8 and inputs.rope.plans.nbytes > 64 * 8 * 2 * 4
    copied = copy.deepcopy(store)
    assert copied.plans.nbytes == 0 and torch.equal(cpu.attend(inputs, copied), expected)
    store.append(torch.randn(2, 2, 64, 16), torch.randn(2, 2, 64, 16))
    check(inputs, store)
    assert store.plans.get(cpu.PackedBlocks).version > blocks.version
    table = weakref.ref(store.plans.get(cpu.PackedBlocks).table)
    del store
    assert table() is None


def test_the_result_does_not_depend_on_the_number_of_threads():
    inputs, store = case(KEYS["nuq4-1%"], VALUES["nuq3-1%"], (1, 4, 1, 64, 900, 1))
    assert_alike_on_threads(lambda: cpu.attend(inputs, store))


def test_unsupported_cases_are_refused():
    inputs, store = case(KEYS["hadamard"].with_settings(pre_rope=True), VALUES["token"], (1, 1, 1, 16, 70, 1))
    with pytest.raises(UnsupportedModelError, match="Hadamard"):
        cpu.attend(inputs, store)
    inputs, store = case(KEYS["nuq2"], VALUES["token"], (1, 1, 1, 16, 70, 1))
    assert cpu.attend(inputs.with_query(inputs.query.double()), store).dtype == torch.float64
    with pytest.raises(ValueError, match="kernel"):
        cpu.attend(inputs, store, kernel="none")


SCHEMES = st.sampled_from(sorted(KEYS))


@settings(max_examples=60, deadline=None)
@given(
    keys=SCHEMES,
    values=SCHEMES,
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.sampled_from([8, 16, 40, 64]), st.integers(65, 260)
    ),
    new=st.integers(0, 1) | st.integers(2, 16),
    sinks=st.integers(0, 5),
    window=st.sampled_from([0, 33]),
    kernel=st.sampled_from(cpu.KERNELS),
    seed=st.integers(0, 2**31),
)
def test_any_recipe_and_shape(keys, values, shape, new, sinks, window, kernel, seed):
    torch.manual_seed(seed)
    batch, group, heads, dim, total = shape
    inputs, store = case(
        KEYS[keys], VALUES[values], (batch, group * heads, heads, dim, total, max(new, 1)), sinks=sinks, window=window
    )
    check(inputs, store, kernel)


@pytest.mark.parametrize("kernel", cpu.KERNELS)
def test_several_sequences_in_one_call_are_attended_to_bit_for_bit_as_one_by_one(kernel):
    """Of other lengths, batches and shapes, one of them without a block."""
    shapes = [(1, 4, 2, 64, 700, 1), (2, 4, 2, 64, 65, 3), (1, 4, 2, 64, 20, 1), (1, 2, 1, 128, 1400, 2)]
    assert_as_one_by_one([case(KEYS["nuq4-1%"], VALUES["nuq3-1%"], shape) for shape in shapes], kernel)
