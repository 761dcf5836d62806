"""Kernels for a GPU over trellis-coded streams against the naive reference in float64; interpreted: few, small cases."""

from dataclasses import replace

import pytest
import torch
from tests.cases import KEYS, VALUES, assert_attends, hide
from tests.stream_cases import case, decode

from narrowkv.attention import AUTO, Rope, StoredRope, resolve_backend
from narrowkv.attention.cuda import decode as cuda
from narrowkv.attention.cuda.stream_tables import LARGEST, StreamTables
from narrowkv.errors import UnsupportedModelError

pytestmark = pytest.mark.skipif(
    not cuda.runs_on(torch.device("cpu")), reason="needs Triton, interpreted (`pip install triton`)"
)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3}
NEW = 18  # queries of a prompt


def check(inputs, store, dtype=torch.float16):
    assert_attends(cuda.attend, inputs.with_query(inputs.query.to(dtype)), store, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("keys", [True, False])
def test_codes_are_decoded_as_torch_decodes_them(keys, dtype):
    """Every rate and state, bit for bit."""
    import triton.language as tl
    from tests.attention.stream_kernel import decode_block

    from narrowkv.attention.cuda.block_table import layouts_of
    from narrowkv.attention.cuda.kernels.streams import codes_of

    _, store = case((1, 2, 2, 64, 65, 1), outliers=0.0)
    quantizer, (column,) = store.quantizers[not keys], store.blocks.columns
    side = (column.page.values, column.page.keys)[keys]
    side.planes[0].copy_(torch.randint(256, side.planes[0].shape, dtype=torch.uint8))
    tables = StreamTables.of_keys(quantizer, case((1, 2, 2, 64, 65, 1))[0].rope) if keys else StreamTables.of_values(quantizer)
    layout = layouts_of(store.quantizers, 2, 64, ("fp16", "fp16"))[not keys]
    found = torch.empty(2, layout.capacity, 64, dtype=dtype)
    address = torch.tensor([side.planes[0].data_ptr()])
    element = tl.float32 if dtype == torch.float32 else tl.float16
    decode_block[(2,)](found, address, codes_of(tables), F=layout, ELEMENT=element)
    streams = side.planes[0][0].mT[..., : layout.stream_bytes - layout.norms].contiguous()
    expected = decode(streams, quantizer.scheme.quantization.counts, quantizer._tables)
    assert torch.equal(found[:, : layout.codes], expected.mT.to(dtype)) and not found[:, layout.codes :].any()


@pytest.mark.parametrize(
    ("shape", "outliers", "learned_rotation", "rope", "dtype"),
    [
        ((1, 1, 1, 80, 64, 1), 0.02, True, "half", torch.float16),  # 63 tokens, none in blocks
        ((3, 7, 1, 16, 67, 1), 0.02, False, "half", torch.float16),  # batch 3, groups of 7
        ((1, 4, 1, 64, 133, 3), 0.0, True, "interleaved", torch.float16),  # rates 1 to 6, 12 rows
        ((1, 6, 1, 16, 68, 3), 0.02, True, "partial", torch.float16),  # more rows than a program takes
        ((1, 1, 1, 80, 130, 1), 0.02, True, "interleaved", torch.float32),
        ((1, 2, 2, 64, 67, 1), 0.0, False, "none", torch.float32),
        ((1, 1, 1, 16, 66, 1), 0.02, False, "none", torch.float16),
    ],
)
def test_streams_of_any_form(shape, outliers, learned_rotation, rope, dtype):
    check(*case(shape, outliers=outliers, learned_rotation=learned_rotation, rope=rope), dtype)


@pytest.mark.parametrize(
    ("shape", "outliers", "rope", "dtype"),
    [
        ((1, 1, 1, 80, 63 + NEW, NEW), 0.02, "half", torch.float16),
        ((2, 2, 1, 16, 130 + NEW, NEW), 0.02, "interleaved", torch.float16),
        ((1, 4, 1, 64, 70 + NEW, NEW), 0.0, "partial", torch.float32),
    ],
)
def test_prompts(shape, outliers, rope, dtype):
    check(*case(shape, outliers=outliers, learned_rotation=True, rope=rope), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("queries", [1, NEW])
def test_positions_that_do_not_follow_each_other(queries, dtype):
    inputs, store = case((1, 2, 1, 16, 66 + queries, queries))
    check(replace(inputs, rope_state=inputs.rope_state // 3 + 1_000_000), store, dtype)


@pytest.mark.parametrize("queries", [7, NEW])
def test_whatever_hides_tokens(queries):
    inputs, store = case((2, 2, 1, 16, 140 + queries, queries), sinks=3, padded=[0, 80])
    check(hide(inputs, store, lambda b, h, q, k: (k <= q) & (k // 48 == q // 48), 40, 2.0), store)


def test_a_cache_that_is_cropped_and_selected():
    inputs, store = case((2, 2, 1, 16, 140, 1), sinks=2, window=10)
    store.crop(101)
    store.select(torch.tensor([1, 1]))
    check(replace(inputs, past=101, new=None, rope_state=torch.arange(101).expand(2, -1)), store)


def test_the_result_does_not_depend_on_how_blocks_are_shared_out(monkeypatch):
    inputs, store = case((1, 2, 1, 16, 200, 1))
    monkeypatch.setattr(cuda, "FEWEST_BLOCKS", 1)
    monkeypatch.setattr(cuda, "PROGRAMS", 2)
    check(inputs, store)


@pytest.mark.parametrize("queries", [1, NEW])
def test_no_forged_outlier_leads_beyond_its_block(queries):
    inputs, store = case((1, 1, 1, 16, 64 + queries, queries), learned_rotation=True)
    inputs, found = inputs.with_query(inputs.query.half()), []
    for exact in (0.0, 30_000.0):
        for side in (store.blocks.columns[0].page.keys, store.blocks.columns[0].page.values):
            side.outlier_index[::2], side.outlier_index[1::2] = 64 * side.shape[2], -1
            side.outlier_values.fill_(exact)
        found.append(cuda.attend(inputs, store))
    assert torch.equal(*found)


def test_what_it_does_not_read_is_refused_and_not_chosen(monkeypatch):
    inputs, store = case((1, 2, 1, 64, 150, 1))
    schemes = tuple(found.scheme for found in store.quantizers)
    monkeypatch.setattr(cuda, "runs_on", lambda device: True)
    gpu = torch.device("cuda")
    assert resolve_backend(AUTO, gpu, torch.float16, [schemes]) == "cuda"
    assert resolve_backend(AUTO, gpu, torch.float16, [schemes], stored=True) == "torch"
    assert resolve_backend(AUTO, gpu, torch.float16, [(schemes[1], schemes[1])]) == "torch"
    with pytest.raises(UnsupportedModelError, match="stored with each token"):
        cuda.attend(replace(inputs, rope=StoredRope("angles0", "once"), rope_state=torch.rand(1, 149, 2, 32)), store)
    with pytest.raises(UnsupportedModelError, match="another rotary embedding"):
        cuda.attend(replace(inputs, rope=Rope(inputs.rope.inverse_frequencies / 2)), store)
    for other in ({"keys": KEYS["nuq2"]}, {"values": VALUES["token"]}):
        with pytest.raises(UnsupportedModelError, match="both keys and values"):
            cuda.attend(*case((1, 2, 1, 64, 65, 1), **other))
    inputs, store = case((1, 2, 1, 64, 150, 1))
    store.blocks.columns[0].page.keys.planes[0] = store.blocks.columns[0].page.keys.planes[0][:, :, 1:]
    with pytest.raises(UnsupportedModelError, match="bytes for a token"):
        cuda.attend(inputs, store)


def test_a_mean_that_16_bits_do_not_hold_is_refused():
    inputs, store = case((1, 2, 1, 16, 65, 1))
    store.quantizers[0].mean.fill_(65_000.0)
    store.quantizers[0].scales.fill_(65_000.0 / LARGEST / 10)
    with pytest.raises(UnsupportedModelError, match="exceeds 16 bits"):
        cuda.attend(inputs, store)
