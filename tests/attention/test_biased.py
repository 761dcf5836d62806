"""Backends over stores that have taken a bias out of keys and values: scores and sums get it back, against the naive
reference.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.cases import KEYS, VALUES, assert_attends, case

from narrowkv.attention import AUTO, resolve_backend, tiled
from narrowkv.attention.cpu import decode as cpu
from narrowkv.attention.cpu.int16 import SUPPORTED
from narrowkv.attention.cuda import decode as cuda
from narrowkv.errors import UnsupportedModelError

SHAPES = [
    # batch, query heads, kv heads, head_dim, tokens, new
    pytest.param((1, 1, 1, 80, 64, 1), id="one head, head_dim 80, 63 tokens"),
    pytest.param((3, 6, 2, 32, 130, 1), id="batch 3, groups of 3"),
    pytest.param((2, 4, 2, 64, 300, 5), id="five queries"),
]
ONLINE = [name for name, scheme in KEYS.items() if scheme.with_settings(pre_rope=False).takes_bias_out]


def biased(keys, values, *args, **options):
    return case(KEYS[keys].with_settings(pre_rope=False), VALUES[values], *args, biased=True, **options)


@pytest.mark.parametrize("kernel", cpu.KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ONLINE)
def test_every_form_of_codes_on_a_cpu(form, shape, kernel):
    assert_attends(partial(cpu.attend, kernel=kernel), *biased(form, form, shape), 1e-5)


@pytest.mark.skipif(not SUPPORTED, reason="needs AVX-512 with VBMI and VNNI")
@pytest.mark.parametrize("shape", [(1, 1, 1, 128, 65, 1), (3, 6, 2, 64, 131, 1), (1, 5, 1, 64, 700, 5)])
@pytest.mark.parametrize(("keys", "values"), [("kivi-2", "fp4"), ("token_head groups", "hadamard"), ("hadamard", "fp4")])
def test_whole_numbers_of_16_bits(keys, values, shape):
    inputs, store = biased(keys, values, shape)
    assert cpu._blocks(store, None).int16_kernels == [cpu.INT16]
    assert_attends(partial(cpu.attend, kernel=cpu.INT16), inputs, store, 2e-3)


@pytest.mark.parametrize("rope", ["interleaved", "partial", "stored"])
@pytest.mark.parametrize("attend", [cpu.attend, tiled.attend])
def test_every_rotary_embedding(attend, rope):
    assert_attends(attend, *biased("token", "token", (2, 4, 2, 32, 200, 2), rope=rope), 1e-5)


@pytest.mark.parametrize("attend", [cpu.attend, tiled.attend])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 40])
def test_rows_that_begin_elsewhere_windows_and_softcaps(attend, window, softcap):
    inputs, store = biased("token", "kivi-2", (3, 6, 2, 32, 300, 7), sinks=3, padded=[0, 150, 290])
    mask = replace(inputs.mask, sliding_window=window)
    inputs = replace(inputs, mask=mask, softcap=softcap, sink_logits=torch.randn(inputs.query.shape[1]))
    if window:
        store.evict(inputs.past - window + 1)
    assert_attends(attend, inputs, store, 1e-5)


def test_a_query_without_visible_packed_tokens_gets_no_bias():
    inputs, store = biased("token", "token", (2, 2, 1, 16, 100, 1), padded=[0, 100])
    found = cpu.attend(inputs, store)
    assert found[0].any() and not found[1].any()


def test_a_store_that_is_cropped_selected_and_grows():
    inputs, store = biased("hadamard", "token", (3, 4, 2, 16, 330, 1), sinks=2, window=40)
    assert_attends(cpu.attend, inputs, store, 1e-5)
    store.crop(201)
    store.bias.position_buffer.crop(201)
    inputs = replace(inputs, past=201, new=None)
    assert_attends(cpu.attend, inputs, store, 1e-5)
    rows = torch.tensor([2, 0, 2])
    store.select(rows)
    store.bias.position_buffer.select(rows)
    assert_attends(cpu.attend, inputs, store, 1e-5)
    store.bias.position_buffer.append(torch.arange(201, 301).expand(3, -1))
    store.append(torch.randn(3, 2, 100, 16), torch.randn(3, 2, 100, 16))
    assert_attends(cpu.attend, replace(inputs, past=301), store, 1e-5)


def test_backends_without_bias_support_are_refused_and_not_chosen():
    before = KEYS["token"]
    inputs, store = biased("token", "token", (1, 1, 1, 16, 70, 1))
    with pytest.raises(UnsupportedModelError, match="choose backend torch"):
        cuda.attend(inputs, store)
    store.quantizers = (replace(store.quantizers[0], scheme=before), store.quantizers[1])
    with pytest.raises(UnsupportedModelError, match="stored unrotated; choose backend torch"):
        cpu.attend(inputs, store)
    processor, pairs = torch.device("cpu"), [(before, VALUES["token"])]
    assert resolve_backend(AUTO, processor, torch.float32, pairs) == "cpu"
    assert resolve_backend(AUTO, processor, torch.float32, pairs, biased=True) == "torch"
    assert resolve_backend(AUTO, processor, torch.float32, [(KEYS["nuq4-1%"], VALUES["token"])], biased=True) == "cpu"
