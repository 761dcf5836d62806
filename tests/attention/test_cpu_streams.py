"""The compiled attention over trellis-coded streams against the naive reference in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.cases import (
    KEYS,
    VALUES,
    assert_alike_on_threads,
    assert_as_one_by_one,
    assert_attends,
    frequencies,
    hide,
)
from tests.stream_cases import ROPES, case

from narrowkv import _kernels
from narrowkv.attention import AUTO, AttentionMask, Rope, StoredRope, describe_backend, resolve_backend
from narrowkv.attention.cpu import decode as cpu
from narrowkv.attention.cpu.int16 import AVX2_INT16, INT16, STREAM_KERNELS
from narrowkv.errors import UnsupportedModelError

SHAPES = [
    # batch, query heads, kv heads, head_dim, tokens, new
    pytest.param((1, 1, 1, 80, 64, 1), id="one head, 63 tokens in blocks"),
    pytest.param((3, 6, 2, 16, 130, 1), id="batch 3, groups of 3, head_dim 16"),
    pytest.param((1, 4, 1, 64, 700, 5), id="one KV head, 700 tokens, five queries"),
]


def check(inputs, store, kernel=cpu.KERNELS[0], tolerance=2e-6):
    assert_attends(partial(cpu.attend, kernel=kernel), inputs, store, max(tolerance, WITHIN.get(kernel, 0.0)))


FORMS = [*cpu.KERNELS, *STREAM_KERNELS]
WITHIN = {INT16: 2e-3, AVX2_INT16: 2e-3}  # else float32 is as exact as can be


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("learned_rotation", [False, True])
@pytest.mark.parametrize("outliers", [0.0, 0.02])
@pytest.mark.parametrize("shape", SHAPES)
def test_streams_of_any_form(shape, outliers, learned_rotation, kernel):
    inputs, store = case(shape, learned_rotation=learned_rotation, outliers=outliers)
    if outliers:
        assert all(len(side.outlier_index) for page in store.blocks.pages() for side in (page.keys, page.values))
    check(inputs, store, kernel)


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("rope", ROPES)
def test_every_rotary_embedding(rope, kernel):
    check(*case((2, 4, 2, 64, 200, 2), rope=rope), kernel)


@pytest.mark.parametrize("kernel", cpu.KERNELS)
def test_streams_of_only_keys_or_only_values(kernel):
    check(*case((2, 4, 2, 80, 200, 1), keys=KEYS["nuq4-1%"]), kernel)
    check(*case((2, 4, 2, 80, 200, 1), values=VALUES["token"]), kernel)


@pytest.mark.parametrize("kernel", cpu.KERNELS)
def test_each_code_is_decoded_as_torch_decodes_it(kernel):
    """One query for each coefficient of one token, which alone is seen: its value comes out as it is."""
    inputs, store = case((1, 1, 1, 64, 129, 1), learned_rotation=True, outliers=0.0, rope="none")
    values = store.read(128)[1]
    for token in range(128):
        inputs = replace(inputs, mask=AttentionMask(rule=lambda b, h, q, k, token=token: k == token))
        found = cpu.attend(inputs, store, kernel=kernel)
        torch.testing.assert_close(found[0, 0, 0], values[0, 0, token], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [cpu.KERNELS[0], *STREAM_KERNELS])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 16])
def test_groups_of_query_heads(group, kernel):
    check(*case((2, 2 * group, 2, 16, 150, 3)), kernel)


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("first", [0, 3, 2**21, 2**31 - 500, -500])
def test_positions_that_do_not_follow_each_other(first, kernel):
    inputs, store = case((2, 4, 2, 64, 200, 1))
    rope_state = inputs.rope_state.clone()
    rope_state[1, 21:70] += 5
    rope_state[1, 100:] = rope_state[1, 100:].flip(0)
    check(
        replace(inputs, rope_state=rope_state + first),
        store,
        kernel,
        tolerance=1e-4 if first < 0 or first > 2**20 else 2e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outliers_stored_in_16_bits(dtype):
    check(*case((2, 4, 2, 80, 150, 1), dtype=dtype))


@pytest.mark.parametrize("kernel", [cpu.KERNELS[0], *STREAM_KERNELS])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("rule", [None, lambda b, h, q, k: (k <= q) & (k // 48 == q // 48), lambda b, h, q, k: k <= q + b])
def test_masks_padding_and_windows(rule, window, softcap, kernel):
    inputs, store = case((3, 6, 2, 16, 300, 7), sinks=3, padded=[0, 150, 290])
    inputs = hide(inputs, store, rule, window, softcap)
    check(inputs, store, kernel)


@pytest.mark.parametrize("kernel", STREAM_KERNELS)
@pytest.mark.parametrize("factor", [0.0, 5.0])
def test_attention_that_is_flat_or_of_few_tokens(factor, kernel):
    inputs, store = case((1, 4, 2, 64, 700, 1))
    check(inputs.with_query(factor * inputs.query), store, kernel)


@pytest.mark.parametrize("kernel", STREAM_KERNELS)
def test_a_query_that_one_channel_rules(kernel):
    inputs, store = case((1, 6, 1, 80, 700, 1))
    query = inputs.query.clone()
    query[..., 7] *= 1000
    check(inputs.with_query(query / query.norm(dim=-1, keepdim=True)), store, kernel)


def test_a_query_that_sees_nothing_yields_zeros():
    inputs, store = case((2, 2, 1, 16, 100, 1), padded=[0, 100])
    found = cpu.attend(inputs, store)
    assert found[0].any() and not found[1].any()


def test_a_cache_as_it_grows_is_cropped_and_selected():
    inputs, store = case((3, 4, 2, 16, 330, 1), sinks=2, window=40)
    check(inputs, store)
    store.crop(201)
    inputs = replace(inputs, past=201, new=None, rope_state=torch.arange(201).expand(3, -1))
    check(inputs, store)
    store.select(torch.tensor([2, 0, 2]))
    check(inputs, store)
    for tokens in (3, 100):
        store.append(torch.randn(3, 2, tokens, 16), torch.randn(3, 2, tokens, 16))
        length = inputs.past + tokens
        inputs = replace(inputs, past=length, rope_state=torch.arange(length).expand(3, -1))
        check(inputs, store)


def test_the_result_does_not_depend_on_the_number_of_threads():
    inputs, store = case((1, 4, 1, 64, 900, 1))
    assert_alike_on_threads(lambda: cpu.attend(inputs, store))


@pytest.mark.parametrize("kernel", FORMS)
def test_forged_indices_and_counts_read_nothing_outside_of_memory(kernel):
    """What a loader would refuse: the sanitizers see whether anything is read or written outside."""
    inputs, store = case((1, 2, 1, 64, 150, 1))
    for side in (store.blocks.columns[0].page.keys, store.blocks.columns[0].page.values):
        side.outlier_index.copy_(side.outlier_index.flip(0))
        side.outlier_index[::3] = -1
        side.planes[0][::2].fill_(255)
    for buffer in store.tail.buffers:
        buffer.codes.fill_(255)
        buffer.outlier_index[: buffer.outliers : 2] = 2**40
    cpu.attend(inputs, store, kernel=kernel)


@pytest.mark.parametrize(
    ("name", "forged"),
    [
        ("counts", [0, 1, 0, 1, 0, -1]),
        ("counts", [0, 1, 0, 1, 0, 9]),
        ("counts", [1, 1]),
        ("high", torch.zeros(5, 16, dtype=torch.int8)),
        ("low", torch.zeros(6, 8, dtype=torch.int8)),
        ("finer", torch.ones(15)),
        ("query_index", torch.full((2, 16), 16, dtype=torch.int32)),
        ("query_index", torch.full((2, 16), -1, dtype=torch.int32)),
        ("query_index", torch.zeros(2, 8, dtype=torch.int32)),
        ("channels", torch.full((16,), 16, dtype=torch.int32)),
        ("channels", torch.zeros(15, dtype=torch.int32)),
        ("channels", None),
        ("query_rotations", torch.zeros(2, 2, 2, 2, 7)),
        ("query_rotations", None),
        ("offsets", torch.zeros(2, 16, 15)),
        ("offsets", None),
        ("int16_scales", None),
        ("int16_maxima", torch.ones(2, 15, dtype=torch.int32)),
        ("int16_offsets", torch.zeros(2, 8, 16, dtype=torch.int16)),
    ],
)
def test_tables_smaller_than_what_is_read_of_them_are_refused(name, forged):
    sound = {
        "counts": [0, 1, 0, 1, 0, 0],
        "norms": False,
        "high": torch.zeros(6, 16, dtype=torch.int8),
        "low": torch.zeros(6, 16, dtype=torch.int8),
        "finer": torch.ones(16),
        "query_index": torch.zeros(2, 16, dtype=torch.int32),
        "channels": torch.zeros(16, dtype=torch.int32),
        "query_rotations": torch.zeros(2, 2, 2, 2, 8),
        "offsets": torch.zeros(2, 16, 16),
    }
    uses_int16 = {
        "uses_int16": True,
        "int16_scales": torch.ones(2, 16, dtype=torch.int32),
        "int16_maxima": torch.ones(2, 16, dtype=torch.int32),
        "int16_offsets": torch.zeros(2, 8, 16, 2, dtype=torch.int16),
    }
    _kernels.Streams(**sound)
    if name in uses_int16:
        sound |= uses_int16
        _kernels.Streams(**sound)
    with pytest.raises(ValueError, match=r"streams|tables|offsets|query|rotations"):
        _kernels.Streams(**sound | {name: forged})


def test_blocks_of_other_streams_are_refused():
    inputs, store = case((1, 2, 1, 64, 150, 1))
    page = store.blocks.columns[0].page
    page.values.planes[0] = page.values.planes[0][:, :, 1:]
    with pytest.raises(UnsupportedModelError, match="Blocks of trellis-coded streams"):
        cpu.attend(inputs, store)


@pytest.mark.parametrize("kernel", [cpu.KERNELS[0], *STREAM_KERNELS])
def test_heads_of_512_channels(kernel):
    check(*case((1, 2, 1, 512, 140, 1)), kernel)


@pytest.mark.skipif(not STREAM_KERNELS, reason="needs AVX2")
def test_int16_is_chosen_for_16_bits_and_for_streams_of_both_keys_and_values():
    inputs, store = case((1, 4, 2, 64, 200, 1))
    rounded = inputs.with_query(inputs.query.bfloat16())
    exact = rounded.with_query(rounded.query.float())
    words = cpu.attend(exact, store, kernel=STREAM_KERNELS[0])
    assert torch.equal(cpu.attend(rounded, store), words)
    assert not torch.equal(cpu.attend(exact, store), words)
    schemes = [found.scheme for found in store.quantizers]
    assert cpu.uses_int16(*schemes, 64, inputs.rope) and not cpu.uses_int16(schemes[0], VALUES["token"], 64, inputs.rope)
    inputs, store = case((1, 4, 2, 80, 200, 1), values=VALUES["token"])
    for kernel in STREAM_KERNELS:
        with pytest.raises(ValueError, match=f"no kernel {kernel}"):
            cpu.attend(inputs, store, kernel=kernel)


@pytest.mark.parametrize(("supported", "named"), [(True, "cpu (avx512, int16)"), (False, "cpu (avx2, int16)")])
def test_the_backend_says_which_instructions_words_need(supported, named, monkeypatch):
    monkeypatch.setattr("narrowkv.attention.SUPPORTED", supported)
    assert describe_backend("cpu", True) == named


def test_unsupported_schemes_are_refused_and_not_chosen():
    inputs, store = case((1, 2, 1, 64, 150, 1))
    schemes = tuple(found.scheme for found in store.quantizers)
    processor = torch.device("cpu")
    assert resolve_backend(AUTO, processor, torch.float32, [schemes]) == "cpu"
    assert resolve_backend(AUTO, processor, torch.float32, [schemes], stored=True) == "torch"
    assert resolve_backend(AUTO, processor, torch.float32, [(schemes[1], schemes[1])]) == "torch"
    stored = StoredRope("angles0", "once")
    angles = torch.rand(1, 149, 2, 32)
    with pytest.raises(UnsupportedModelError, match="stored with each token; choose backend torch"):
        cpu.attend(replace(inputs, rope=stored, rope_state=angles), store)
    with pytest.raises(UnsupportedModelError, match="another rotary embedding"):
        cpu.attend(replace(inputs, rope=Rope(frequencies(32) / 2)), store)


@pytest.mark.parametrize("kernel", FORMS)
def test_several_sequences_in_one_call_are_attended_to_bit_for_bit_as_one_by_one(kernel):
    shapes = [(1, 4, 2, 64, 700, 1), (2, 4, 2, 64, 65, 3), (1, 4, 2, 64, 20, 1), (1, 2, 1, 64, 1400, 2)]
    assert_as_one_by_one([case(shape) for shape in shapes], kernel)
