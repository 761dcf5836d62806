"""Bits and bytes as they are allocated, and what is allocated on the way."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from narrowkv import get_recipe
from narrowkv.calibration import Fit
from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme
from narrowkv.store import LayerStore

HEADS, HEAD_DIM, TOKENS, CHUNK = 32, 128, 32_768, 2048


def big_store(name):
    """A store calibrated on elements like those it will hold, and one chunk of such elements."""
    chunk = (torch.randn(1, HEADS, CHUNK, HEAD_DIM) * (torch.rand(HEADS, 1, HEAD_DIM) * 3 + 0.1)).half()
    recipe, quantizers = get_recipe(name), []
    for scheme in (recipe.keys, recipe.values):
        fit, samples = Fit(scheme), chunk[0].transpose(0, 1)
        fit.observe_range(samples)
        fit.observe_codebook(samples[:256], torch.ones_like(samples[:256]))
        quantizers.append(fit.quantizer((HEADS, HEAD_DIM), scheme))
    return LayerStore(quantizers[0], quantizers[1], recipe.sinks), chunk


def stored_bytes(store):
    tables = sum(table.nbytes for quantizer in store.quantizers for table in quantizer.tensors().values())
    return tables + sum(tensor.untyped_storage().nbytes() for tensor in store.tensors())


def peak_bytes(events):
    """Largest sum of live allocations, from the allocator's own events."""
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    live = peak = 0
    for event in memory:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("name", "most"),
    [
        pytest.param("nuq4-1%", 4.40, marks=pytest.mark.wide),
        pytest.param("nuq3-1%", 3.40, marks=pytest.mark.wide),
        ("nuq2-1%", 2.40),
        ("nuq2", 2.05),
    ],
)
def test_a_long_context_takes_the_promised_bits_and_no_more_on_the_way(name, most):
    store, chunk = big_store(name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for i in range(TOKENS // CHUNK):
            keys = chunk.roll(i, dims=2)
            values = keys.clone()
            store.append(keys, values)
            del keys, values
    nbytes = stored_bytes(store)
    assert 8 * nbytes / (2 * TOKENS * HEADS * HEAD_DIM) <= most
    one_chunk = 2 * CHUNK * HEADS * HEAD_DIM * 2
    assert peak_bytes(profiler.profiler.kineto_results.events()) <= 1.15 * nbytes + one_chunk


def test_decoding_token_by_token_wastes_little():
    store, chunk = big_store("nuq2-1%")
    for start, stop in [(0, 1024), *((token, token + 1) for token in range(1024, 1984))]:
        store.append(chunk[:, :, start:stop], chunk[:, :, start:stop])
    assert store.length == 1984
    assert 8 * stored_bytes(store) / (2 * 1984 * HEADS * HEAD_DIM) <= 1.15 * 2.40


@pytest.mark.parametrize("chunks", [[100] * 300, [96] * 300, [140, *[1] * 80] * 60], ids=["100s", "96s", "turns"])
@pytest.mark.parametrize("name", ["int2", "int3 with outliers"])
def test_tokens_that_come_in_odd_pieces_waste_little(chunks, name):
    scheme = Scheme(Quantization(2, "int")) if name == "int2" else Scheme(Quantization(3, "int"), outliers=Outliers(0.02))
    store = LayerStore(Quantizer(scheme), Quantizer(scheme))
    whole = LayerStore(Quantizer(scheme), Quantizer(scheme))
    x = torch.randn(1, 2, sum(chunks), 64, dtype=torch.bfloat16)
    whole.append(x, x)
    for chunk in x.split(chunks, dim=2):
        store.append(chunk, chunk)
    assert torch.equal(store.read()[0], whole.read()[0])
    assert stored_bytes(store) <= 1.12 * stored_bytes(whole)


def test_exact_storage_is_counted_at_its_width():
    recipe = get_recipe("fp16")
    store = LayerStore(*recipe.quantizers(0))
    x = torch.randn(2, 2, 640, 16, dtype=torch.bfloat16)
    store.append(x, x)
    assert stored_bytes(store) == 2 * x.nbytes + 2 * 10 * 8  # and in which slots the ten blocks of each row lie


@pytest.mark.parametrize(("name", "bits"), [("kivi-2-r0", 3.0), ("kivi-4-r0", 5.0)])
def test_allocated_bits_with_groups(name, bits):
    recipe = get_recipe(name)
    store = LayerStore(*recipe.quantizers(0), recipe.sinks, recipe.residual_length)
    x = torch.randn(1, 8, 4096, 128).half()
    store.append(x, x)
    assert bits <= 8 * stored_bytes(store) / (2 * x.numel()) < bits + 0.01
