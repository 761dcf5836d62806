"""Kernels for a GPU against the naive reference in float64; without a GPU they are interpreted, which is slow: few, small
cases.
"""

from dataclasses import replace

import pytest
import torch
from tests.cases import KEYS, VALUES, assert_attends, case, hide, made

from narrowkv.attention import AUTO, resolve_backend
from narrowkv.attention.cuda import codebooks
from narrowkv.attention.cuda import decode as cuda
from narrowkv.codec import Outliers, Quantization, Scheme
from narrowkv.errors import UnsupportedModelError

pytestmark = pytest.mark.skipif(
    not cuda.runs_on(torch.device("cpu")), reason="needs Triton, interpreted (`pip install triton`)"
)
BY_TOKEN = Scheme(Quantization(4, "nuq", strategy="token"), outliers=Outliers(0.02))
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3}


def check(inputs, store, dtype=torch.float32):
    assert_attends(cuda.attend, inputs.with_query(inputs.query.to(dtype)), store, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("keys", KEYS)
def test_every_form_of_keys(keys, dtype):
    check(*case(KEYS[keys], VALUES["token"], (1, 2, 1, 24, 66, 1)), dtype)


@pytest.mark.parametrize("values", VALUES)
def test_every_form_of_values(values):
    check(*case(KEYS["kivi-2"], VALUES[values], (1, 2, 1, 80, 66, 1)), torch.float16)


@pytest.mark.parametrize("rope", ["interleaved", "partial", "stored"])
@pytest.mark.parametrize("keys", ["nuq3-1%", "nuq4-1%"])
def test_every_rotary_embedding(keys, rope):
    check(*case(KEYS[keys], VALUES["nuq2"], (2, 2, 1, 16, 70, 2), rope=rope))


@pytest.mark.parametrize(("group", "queries"), [(1, 1), (5, 3), (16, 1), (3, 16), (16, 5)])
def test_groups_of_query_heads_and_several_queries(group, queries):
    check(*case(KEYS["nuq3-1%"], VALUES["kivi-4-g8"], (1, group, 1, 16, 130, queries)))


@pytest.mark.parametrize("length", [64, 128, 256])
def test_lengths_of_a_row_of_codes(length):
    for values in ("kivi-2", "token_head groups", "nuq3-1%"):
        check(*case(KEYS["nuq2"], VALUES[values], (1, 1, 1, length, 66, 1)), torch.float16)


def test_heads_shorter_than_a_word_of_codes():
    check(*case(KEYS["nuq3-1%"], VALUES["nuq2"], (1, 2, 1, 8, 66, 1)), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_elements_of_another_dtype(dtype):
    check(*case(KEYS["exact"], VALUES["exact"], (2, 2, 2, 16, 70, 1), dtype=dtype, window=20), torch.float16)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("rule", [None, lambda b, h, q, k: (k <= q) & (k // 48 == q // 48)])
def test_masks_padding_and_windows(rule, window, softcap):
    inputs, store = case(KEYS["nuq4-1%"], BY_TOKEN, (3, 2, 1, 16, 150, 7), sinks=3, padded=[0, 70, 140])
    inputs = hide(inputs, store, rule, window, softcap)
    check(inputs, store)


def test_a_query_that_sees_nothing_yields_zeros():
    inputs, store = case(KEYS["nuq2"], VALUES["token"], (2, 2, 1, 16, 70, 1), padded=[0, 70])
    found = cuda.attend(inputs, store)
    assert found[0].any() and not found[1].any()


def test_positions_that_do_not_follow_each_other():
    inputs, store = case(KEYS["nuq4-1%"], BY_TOKEN, (1, 2, 1, 16, 135, 1))
    inputs = replace(inputs, rope_state=inputs.rope_state // 3 + 1_000_000)
    check(inputs, store)


@pytest.mark.parametrize("total", [3, 64, 200])
def test_any_length_and_none_in_blocks(total):
    check(*case(KEYS["kivi-2"], VALUES["kivi-2"], (1, 2, 1, 16, total, 1), sinks=2, window=33))


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_outliers_far_beyond_the_largest_level(scale):
    def elements(*shape):
        x = scale * torch.randn(shape)
        x[..., 17, 3] *= 100
        return x

    check(*case(KEYS["token"], BY_TOKEN, (1, 2, 1, 32, 70, 1), elements=elements), torch.float16)


def drawn_far(*shape):
    return 50 * torch.randn(shape)


def drawn_huge(*shape):
    return 60_000 - 10_000 * torch.rand(shape)


def drawn_near_but_for_one_token(*shape):
    x = torch.zeros(shape)
    x[:, :, 17] = 50
    return x


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("keys", ["nuq3-1%", "nuq4-1%"])
@pytest.mark.parametrize(("elements", "least"), [(drawn_far, 512), (drawn_near_but_for_one_token, 24), (torch.zeros, 0)])
def test_outliers_concentrated_in_few_tokens_or_channels(elements, least, keys, dtype):
    """Many more than a round takes; all of one token; zeros."""
    inputs, store = case(KEYS[keys], VALUES["nuq3-1%"], (1, 2, 1, 24, 66, 1), elements=elements)
    (column,) = store.blocks.columns
    assert column.page.values.outlier_offsets[-1] >= least
    check(inputs.with_query(inputs.query / 16), store, dtype)  # of elements this large, rounded, scores would differ by more


def test_elements_that_overflow_16_bits():
    far = made(KEYS["nuq2"], 1, 16)
    far.scale[0, 3], far.zero[0, 3] = 48, 50_000
    with pytest.raises(UnsupportedModelError, match="50,048"):
        codebooks.codebooks_of(far, True)
    for keys, values in (("exact", "token"), ("nuq4-1%", "exact"), ("token", "nuq4-1%")):
        inputs, store = case(KEYS[keys], VALUES[values], (1, 2, 1, 16, 66, 1), elements=drawn_huge)
        assert cuda.attend(inputs.with_query(inputs.query.half()), store).isnan().all()


def test_a_cache_as_it_grows_is_cropped_and_selected():
    inputs, store = case(KEYS["nuq2"], VALUES["kivi-2"], (2, 2, 1, 16, 180, 1), sinks=2, window=40)
    check(replace(inputs, past=180, new=None, rope_state=torch.arange(180).expand(2, -1)), store)  # strict
    store.crop(101)
    inputs = replace(inputs, past=101, new=None, rope_state=torch.arange(101).expand(2, -1))
    check(inputs, store)
    store.select(torch.tensor([1, 1]))
    store.append(torch.randn(2, 1, 70, 16), torch.randn(2, 1, 70, 16))
    check(replace(inputs, past=171, rope_state=torch.arange(171).expand(2, -1)), store)


def test_the_result_does_not_depend_on_how_blocks_are_shared_out(monkeypatch):
    inputs, store = case(KEYS["nuq4-1%"], BY_TOKEN, (1, 2, 1, 16, 260, 1))
    monkeypatch.setattr(cuda, "FEWEST_BLOCKS", 1)
    for programs in (1, 3):
        monkeypatch.setattr(cuda, "PROGRAMS", programs)
        check(inputs, store)


def test_the_operator_passes_opcheck():
    from narrowkv.attention.cuda import launch

    inputs, store = case(KEYS["nuq2"], VALUES["hadamard"], (1, 2, 1, 16, 70, 1))
    call = cuda.prepare(inputs, store)
    tensors, plan = launch.tensors_of(call.parts), launch.to_text(call.plan)
    assert launch.from_text(plan) == call.plan
    torch.library.opcheck(
        torch.ops.narrowkv.attend_packed,
        (call.query, call.query, call.lengths, tensors, plan, *call.elements),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_unsupported_cases_are_refused():
    inputs, store = case(KEYS["hadamard"].with_settings(pre_rope=True), VALUES["token"], (1, 1, 1, 16, 70, 1))
    with pytest.raises(UnsupportedModelError, match="Hadamard"):
        cuda.attend(inputs, store)
    inputs, store = case(KEYS["int8"], VALUES["int8"], (1, 1, 1, 264, 70, 1))
    with pytest.raises(UnsupportedModelError, match="264"):
        cuda.attend(inputs, store)
    inputs, store = case(KEYS["nuq2"], VALUES["token"], (1, 1, 1, 16, 70, 1))
    assert cuda.attend(inputs.with_query(inputs.query.double()), store).dtype == torch.float64


def test_cuda_is_chosen_for_a_gpu_where_it_supports_the_recipe(monkeypatch):
    monkeypatch.setattr(cuda, "runs_on", lambda device: True)
    gpu, pair = torch.device("cuda"), (KEYS["nuq2"], VALUES["token"])
    assert resolve_backend(AUTO, gpu, torch.bfloat16, [pair]) == "cuda"
    assert resolve_backend(AUTO, gpu, torch.float64, [pair]) == "torch"
    assert (
        resolve_backend(AUTO, gpu, torch.bfloat16, [(KEYS["hadamard"].with_settings(pre_rope=True), VALUES["token"])])
        == "torch"
    )
    monkeypatch.setattr(cuda, "runs_on", lambda device: False)
    assert resolve_backend(AUTO, gpu, torch.bfloat16, [pair]) == "torch"
