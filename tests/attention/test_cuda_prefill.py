"""Prompts on a GPU against the naive reference in float64: kernels that decode blocks, interpreted without a GPU (small
cases).
"""

from dataclasses import replace

import pytest
import torch
from tests.cases import KEYS, VALUES, assert_attends, case, hide

from narrowkv.attention import online_softmax, tiled
from narrowkv.attention.cuda import decode as cuda
from narrowkv.attention.cuda import prefill
from narrowkv.codec import Outliers, Quantization, Scheme

pytestmark = pytest.mark.skipif(
    not cuda.runs_on(torch.device("cpu")), reason="needs Triton, interpreted (`pip install triton`)"
)
BY_TOKEN = Scheme(Quantization(4, "nuq", strategy="token"), outliers=Outliers(0.02))
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3}
NEW = 18


def check(inputs, store, dtype=torch.float32):
    assert_attends(cuda.attend, inputs.with_query(inputs.query.to(dtype)), store, TOLERANCES[dtype])


@pytest.mark.parametrize("keys", KEYS)
def test_every_form_of_keys(keys):
    check(*case(KEYS[keys], VALUES["kivi-2"], (1, 2, 1, 24, 64 + NEW, NEW)), torch.float16)


@pytest.mark.parametrize("values", VALUES)
def test_every_form_of_values(values):
    check(*case(KEYS["kivi-2"], VALUES[values], (1, 2, 1, 80, 66 + NEW, NEW)), torch.float16)


@pytest.mark.parametrize("name", ["nuq3-1%", "kivi-4-g8", "hadamard", "exact"])
def test_float32_is_exact(name):
    check(*case(KEYS[name], VALUES[name], (1, 1, 1, 16, 66 + NEW, NEW)))


@pytest.mark.parametrize("rope", ["interleaved", "partial", "stored"])
@pytest.mark.parametrize("keys", ["nuq4-1%", "nuq2"])
def test_every_rotary_embedding(keys, rope):
    check(*case(KEYS[keys], VALUES["nuq2"], (2, 2, 1, 16, 70 + NEW, NEW), rope=rope))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("rule", [None, lambda b, h, q, k: (k <= q) & (k // 48 == q // 48)])
def test_masks_padding_and_windows(rule, window, softcap):
    inputs, store = case(KEYS["nuq4-1%"], BY_TOKEN, (3, 2, 1, 16, 130 + NEW, NEW), sinks=3, padded=[0, 70, 140])
    inputs = hide(inputs, store, rule, window, softcap)
    check(inputs, store)


def test_positions_that_do_not_follow_each_other():
    inputs, store = case(KEYS["nuq4-1%"], BY_TOKEN, (1, 2, 1, 16, 135 + NEW, NEW))
    inputs = replace(inputs, rope_state=inputs.rope_state // 3 + 1_000_000)
    check(inputs, store)


@pytest.mark.parametrize("total", [NEW + 3, 64 + NEW, 200])
def test_any_length_and_none_in_blocks(total):
    check(*case(KEYS["kivi-2"], VALUES["kivi-2"], (1, 2, 1, 16, total, NEW), sinks=2, window=33), torch.float16)


def test_a_prompt_before_which_nothing_is_stored():
    inputs, store = case(KEYS["nuq2"], VALUES["token"], (2, 2, 1, 24, NEW, NEW))
    store.reset()
    check(inputs, store, torch.float16)


def test_a_cache_as_it_grows_is_cropped_and_selected():
    inputs, store = case(KEYS["nuq2"], VALUES["kivi-2"], (2, 2, 1, 16, 180, NEW), sinks=2, window=40)
    check(replace(inputs, past=180, new=None, rope_state=torch.arange(180).expand(2, -1)), store)  # strict
    store.crop(101)
    inputs = replace(inputs, past=101, new=None, rope_state=torch.arange(101).expand(2, -1))
    check(inputs, store)
    store.select(torch.tensor([1, 1]))
    store.append(torch.randn(2, 1, 70, 16), torch.randn(2, 1, 70, 16))
    check(replace(inputs, past=171, rope_state=torch.arange(171).expand(2, -1)), store)


@pytest.mark.parametrize("most", [64, 128])
def test_the_result_does_not_depend_on_how_many_blocks_are_decoded_at_a_time(monkeypatch, most):
    def no_plain_decoding(*arguments):
        raise AssertionError("blocks were dequantized by torch")

    monkeypatch.setattr(tiled, "_stored", no_plain_decoding)
    monkeypatch.setattr(prefill, "MOST_TOKENS", most)
    check(*case(KEYS["nuq4-1%"], BY_TOKEN, (1, 2, 1, 16, 200 + NEW, NEW)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_splits_are_merged_as_by_torch(dtype):
    from narrowkv.attention.cuda.kernels import merge_states

    mean, log_total = torch.randn(3, 2, 21, 40), 10 * torch.randn(3, 2, 21)
    more, log_more = torch.randn(3, 21, 2, 40, dtype=dtype).transpose(1, 2), 10 * torch.randn(3, 2, 32)[..., :21]
    log_total[0, 0, :3] = log_more[0, 0, 2:5] = -torch.inf
    expected = mean.clone(), log_total.clone()
    online_softmax.merge_states(*expected, more, log_more)
    merge_states.merge_states(mean, log_total, more, log_more)
    torch.testing.assert_close((mean, log_total), expected)
