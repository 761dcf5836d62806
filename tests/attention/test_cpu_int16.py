"""The kernel that multiplies int16, against the naive reference in float64: a relative error of at most 2e-3."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.cases import KEYS, VALUES, assert_as_one_by_one, assert_attends, case

from narrowkv.attention import AttentionMask, Rope, describe_backend
from narrowkv.attention.cpu import decode as cpu
from narrowkv.attention.cpu import int16
from narrowkv.codec import Outliers, Quantization, Scheme

pytestmark = pytest.mark.skipif(not int16.SUPPORTED, reason="needs AVX-512 with VBMI and VNNI")
READ_KEYS = [name for name in KEYS if name not in ("int8", "kivi-4-g8", "token", "exact")]
READ_VALUES = {
    "nuq4-1%": Scheme(Quantization(4, "nuq", strategy="token"), outliers=Outliers(0.01)),
    "nuq3": Scheme(Quantization(3, "nuq", strategy="token_head")),
    "nuq2-1%": Scheme(Quantization(2, "nuq", strategy="token"), outliers=Outliers(0.01)),
    "kivi-2": Scheme(Quantization(2, "int", strategy="token_head", group_size=32)),
    "kivi-3-2%": Scheme(Quantization(3, "int", strategy="token_head", group_size=64), outliers=Outliers(0.02)),
    **{name: VALUES[name] for name in VALUES if name.startswith(("fp4", "hadamard"))},
}
SHAPES = [
    pytest.param((1, 1, 1, 128, 65, 1), id="one head, 65 tokens"),
    pytest.param((3, 6, 2, 64, 131, 1), id="batch 3, groups of 3, head_dim 64"),
    pytest.param((1, 5, 1, 256, 700, 5), id="one KV head, 700 tokens, five queries, head_dim 256"),
]


def check(inputs, store):
    assert cpu._blocks(store, inputs.rope).int16_kernels == [cpu.INT16]
    assert_attends(partial(cpu.attend, kernel=cpu.INT16), inputs, store, 2e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keys", READ_KEYS)
def test_every_form_of_keys(keys, shape):
    check(*case(KEYS[keys], VALUES["token"], shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", READ_VALUES)
def test_every_form_of_values(values, shape):
    check(*case(KEYS["nuq4-1%"], READ_VALUES[values], shape))


@pytest.mark.parametrize("rope", ["interleaved", "partial"])
def test_pairs_of_channels_that_are_not_halves(rope):
    check(*case(KEYS["nuq3-1%"], READ_VALUES["nuq3"], (2, 4, 2, 64, 200, 2), rope=rope))


@pytest.mark.parametrize("group", [1, 2, 7, 16])
def test_groups_of_query_heads(group):
    check(*case(KEYS["nuq4-1%"], READ_VALUES["nuq2-1%"], (2, 2 * group, 2, 64, 150, 3)))
    check(*case(KEYS["kivi-2"], READ_VALUES["kivi-2"], (2, 2 * group, 2, 64, 150, 3)))


@pytest.mark.parametrize("window", [None, 40])
def test_masks_padding_and_windows(window):
    inputs, store = case(KEYS["nuq4-1%"], VALUES["token"], (3, 6, 2, 64, 300, 7), sinks=3, padded=[0, 150, 290])
    inputs = replace(inputs, mask=AttentionMask(inputs.mask.padding, window, batch=3))
    check(replace(inputs, softcap=2.0, sink_logits=torch.randn(6)), store)


@pytest.mark.parametrize("name", ["nuq4-1%", "kivi-2"])
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_outliers_far_beyond_the_largest_level(name, scale):
    def elements(*shape):
        x = scale * torch.randn(shape)
        x[..., 17, 3] *= 300
        x[..., 90, 5] *= -50
        return x

    check(*case(KEYS[name], READ_VALUES[name], (2, 4, 2, 64, 200, 1), elements=elements))


@pytest.mark.parametrize("elements", ["one huge logit", "all equal"])
def test_adversarial_elements(elements):
    inputs, store = case(KEYS["nuq4-1%"], READ_VALUES["nuq4-1%"], (1, 4, 2, 64, 300, 1))
    if elements == "one huge logit":  # of the last token but 200
        keys = inputs.rope.rotate(store.read()[0][:, :, :-1], inputs.rope_state)
        query = 3 * keys[:, :, -200, None].repeat_interleave(2, 1)
    else:
        query = torch.zeros_like(inputs.query)
    check(inputs.with_query(query), store)


def test_int16_is_chosen_for_16_bit_queries_and_where_allowed():
    inputs, store = case(KEYS["nuq4-1%"], READ_VALUES["nuq3"], (1, 4, 2, 64, 200, 1))
    exact = cpu.attend(inputs, store, kernel=cpu.KERNELS[0])
    words = cpu.attend(inputs, store, kernel=cpu.INT16)
    assert torch.equal(cpu.attend(inputs, store), exact) and not torch.equal(exact, words)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(cpu.attend(inputs, store), words)
    finally:
        torch.set_float32_matmul_precision("highest")
    rounded = inputs.with_query(inputs.query.bfloat16())
    torch.testing.assert_close(cpu.attend(rounded, store), cpu.attend(rounded, store, kernel=cpu.INT16))


def test_schemes_that_int16_does_not_support_are_computed_in_float32():
    inputs, store = case(KEYS["int8"], READ_VALUES["nuq3"], (1, 4, 2, 64, 200, 1))
    assert torch.equal(cpu.attend(inputs, store, kernel=None), cpu.attend(inputs, store, kernel=cpu.KERNELS[0]))
    with pytest.raises(ValueError, match="no kernel int16"):
        cpu.attend(inputs, store, kernel=cpu.INT16)


def test_a_cache_names_the_int16_backend_that_reads_it():
    scheme, rope = Scheme(Quantization(3, "nuq", strategy="token")), Rope(torch.ones(32))
    assert cpu.uses_int16(KEYS["nuq3-1%"], scheme, 64, rope)
    assert not cpu.uses_int16(KEYS["int8"], scheme, 64, rope) and not cpu.uses_int16(KEYS["nuq3-1%"], scheme, 80, rope)
    assert cpu.uses_int16(KEYS["nuq3-1%"], scheme, 64, Rope(torch.ones(16)))  # half of the channels rotate
    assert describe_backend("cpu", True).endswith(", int16)") and describe_backend("torch", False) == "torch"


def test_several_sequences_in_one_call_are_attended_to_bit_for_bit_as_one_by_one():
    shapes = [(1, 4, 2, 64, 700, 1), (2, 4, 2, 64, 65, 3), (1, 4, 2, 64, 20, 1), (1, 2, 1, 128, 1400, 2)]
    assert_as_one_by_one([case(KEYS["nuq4-1%"], READ_VALUES["nuq3"], shape) for shape in shapes], cpu.INT16)
