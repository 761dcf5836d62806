"""Tokens stored one by one as on a GPU, interpreted: the same elements as without, and nobody waits for a count."""

import pytest
import torch
from tests.cases import KEYS, made

from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme
from narrowkv.codec.cuda import encode as cuda
from narrowkv.codec.outlier_counter import OutlierCounter
from narrowkv.errors import ActivationError
from narrowkv.store import LayerStore

pytestmark = pytest.mark.skipif(cuda.kernels() is None, reason="needs Triton (`pip install triton`)")
BY_TOKEN = Scheme(Quantization(4, "nuq", strategy="token"), outliers=Outliers(0.02))
CASES = {
    "nuq4-1%": ((KEYS["nuq4-1%"], BY_TOKEN), {"sinks": 2}),
    "nuq3-1%": ((KEYS["nuq3-1%"], KEYS["nuq3-1%"]), {"sinks": 1}),
    "nuq2, exact": ((KEYS["nuq2"], KEYS["exact"]), {}),
    "hadamard": ((KEYS["hadamard"], KEYS["hadamard"]), {}),
    "kivi-2": ((KEYS["kivi-2"], KEYS["token_head groups"]), {"residual_length": 16}),
    "a window of single tokens": ((KEYS["nuq2"], BY_TOKEN), {"residual_length": 5}),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Single tokens go by kernels, interpreted, and many at once, which would take long, by plain torch."""
    monkeypatch.setattr(cuda, "runs_on", lambda device: True)
    monkeypatch.setattr(Quantizer, "_encoder_on", lambda quantizer, device: None)
    monkeypatch.setattr(Quantizer, "_encoder", None)


def stores(name):
    pair, options = CASES[name]
    keys, values = made(pair[0], 2, 24), made(pair[1], 2, 24)
    return [LayerStore(keys, values, **options) for _ in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_single_tokens_are_stored_as_many_are(name, as_on_a_gpu, monkeypatch):
    stepped, whole = stores(name)
    keys, values = torch.randn(2, 3, 2, 67, 24).half()
    valid = torch.ones(3, 67, dtype=torch.bool)
    valid[1, 62:64] = False
    stepped.append(keys[:, :, :60], values[:, :, :60], valid[:, :60])
    assert stepped.sinks.seen()
    waits, exact = [], OutlierCounter.exact
    monkeypatch.setattr(
        OutlierCounter, "exact", lambda counter: waits.append(counter.promised != counter._settled) or exact(counter)
    )
    for i in range(60, 67):
        stepped.append(keys[:, :, i : i + 1], values[:, :, i : i + 1], valid[:, i : i + 1])
        assert not any(waits) or stepped.packed % 64 == 0 or stepped.residual_length == 5
        for counter in stepped.counters():
            counter.learn(counter.counts.tolist(), counter.promised)  # as a copy that came in time
        waits.clear()
    whole.append(keys, values, valid)
    assert stepped.length == whole.length
    for found, expected in zip(stepped.read(), whole.read(), strict=True):
        assert torch.equal(found[valid[:, None].expand(found.shape[:3])], expected[valid[:, None].expand(found.shape[:3])])
    stepped.crop(65)
    assert stepped.length == 65


def test_outlier_buffers_grow_with_any_number_of_outliers(as_on_a_gpu):
    stepped, whole = stores("nuq4-1%")
    keys, values = 100 * torch.randn(2, 1, 2, 7, 24)  # all are outliers
    for i in range(7):
        stepped.append(keys[:, :, i : i + 1], values[:, :, i : i + 1])
    whole.append(keys, values)
    for found, expected in zip(stepped.read(), whole.read(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["nuq4-1%", "nuq2, exact", "kivi-2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_reported_when_the_host_reads_the_counts(name, bad, as_on_a_gpu):
    store, _ = stores(name)
    keys, values = torch.randn(2, 1, 2, 70, 24)
    store.append(keys[:, :, :30], values[:, :, :30])
    store.append(keys[:, :, 30:31], values[:, :, 30:31])
    keys[0, 1, 31, 3] = bad
    store.append(keys[:, :, 31:32], values[:, :, 31:32])
    with pytest.raises(ActivationError, match="NaN or infinity"):
        sum(counter.exact() for counter in store.counters())


def test_counts_under_way_when_the_tail_is_sealed_are_left_alone():
    counter = OutlierCounter(torch.device("cpu"))
    counter.promise(5)
    counter.counts[0] = 3
    under_way = counter.promised
    counter.put(0)
    counter.promise(2)
    counter.learn([3, 0], under_way)
    assert counter.most == 2
    counter.learn([1, 0], counter.promised)
    assert counter.most == counter.exact() == 1
