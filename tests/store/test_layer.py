"""The store against a plain list of tensors: what comes out is what the quantizer made of what went in."""

import sys
from pathlib import Path

import pytest
import torch
from tests.codec.test_trellis_quantizer import made as made_streams

import narrowkv
from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme, Transform, quantizer_for
from narrowkv.errors import ActivationError, CacheUseError
from narrowkv.store import BLOCK, LayerStore
from narrowkv.store.late import begin_late

EXACT = Scheme(Quantization(16, "exact"))
SCHEMES = {
    "exact": (EXACT, EXACT),
    "int4": (Scheme(Quantization(4, "int")), Scheme(Quantization(4, "int"))),
    "int3 sparse": (
        Scheme(Quantization(3, "int"), outliers=Outliers(0.02)),
        Scheme(Quantization(3, "int", strategy="token_head"), outliers=Outliers(0.02)),
    ),
    "grouped": (
        Scheme(Quantization(2, "int", strategy="channel", group_size=32)),
        Scheme(Quantization(4, "int", strategy="token_head", group_size=8), outliers=Outliers(0.02)),
    ),
    "symmetric": (
        Scheme(Quantization(4, "fp", strategy="token_head", group_size=8)),
        Scheme(Quantization(2, "int", strategy="token_head"), Transform(hadamard=True)),
    ),
    "mixed": (EXACT, Scheme(Quantization(2, "nf"))),
}
AT_ONCE = [name for name in SCHEMES if name != "grouped"]  # every number encoded when it arrives


def make_store(name, **options):
    keys, values = SCHEMES[name]
    return LayerStore(Quantizer(keys), Quantizer(values), **options)


def fill(store, keys, values, cuts):
    start = 0
    for stop in [*cuts, keys.shape[2]]:
        store.append(keys[:, :, start:stop], values[:, :, start:stop])
        start = stop


def dequantized(store, keys, values):
    """What the quantizers make of the elements; tokens that do not fill a group yet stay exact."""
    whole = keys.shape[2] // store.tokens_per_group * store.tokens_per_group
    if store.tokens_per_group > 1:
        coded = (
            q.dequantize(q.encode(x[:, :, :whole])) if whole else x[:, :, :0]
            for q, x in zip(store.quantizers, (keys, values), strict=True)
        )
        return tuple(torch.cat([part, x[:, :, whole:]], dim=2) for part, x in zip(coded, (keys, values), strict=True))
    return tuple(q.dequantize(q.encode(x)) for q, x in zip(store.quantizers, (keys, values), strict=True))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 1, 63, 80), (3, 2, 200, 56), (2, 1, 64, 8)], ids=str)
def test_results_do_not_depend_on_how_tokens_arrive(name, shape):
    keys, values = torch.randn(shape), torch.randn(shape)
    tokens = shape[2]
    for cuts in ([], range(1, tokens), [tokens // 3, tokens // 3 + 1], [tokens - 1]):
        store = make_store(name)
        fill(store, keys, values, cuts)
        assert store.length == tokens
        for found, expected in zip(store.read(), dequantized(store, keys, values), strict=True):
            assert torch.equal(found, expected)


def test_levels_over_a_sliding_window_do_not_depend_on_how_tokens_arrive(monkeypatch):
    keys, values = torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    schemes = (
        Scheme(Quantization(2, "iv", strategy="block", group_size=16, lookahead_blocks=3)),
        Scheme(Quantization(2, "iv-kmeans", strategy="block", group_size=64, lookahead_blocks=2)),
    )
    stores = []
    for cuts, tile in (([], 2**19), ([], 1), (range(1, 300), 2**19), ([70, 71, 200], 2**19)):
        monkeypatch.setattr("narrowkv.store.sealed.TILE_NUMBERS", tile)
        stores.append(LayerStore(*(quantizer_for(scheme) for scheme in schemes), residual_length=64))
        fill(stores[-1], keys, values, cuts)
        assert stores[-1].residual.tokens == 64 + (300 - 64) % 64
        for found, expected in zip(stores[-1].read(), stores[0].read(), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_small_tiles_give_the_same_result(name, monkeypatch):
    keys, values = torch.randn(2, 2, 333, 56), torch.randn(2, 2, 333, 56)
    whole = make_store(name)
    whole.append(keys, values)
    monkeypatch.setattr("narrowkv.store.sealed.TILE_NUMBERS", 1)
    tiled = make_store(name)
    tiled.append(keys, values)
    starts = [start for start, _, _ in tiled.tiles()]
    assert starts == list(range(0, 333, BLOCK))
    for found, expected in zip(tiled.read(), whole.read(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("stop", [1, 63, 64, 65, 150])
def test_reading_a_prefix(stop):
    keys, values = torch.randn(2, 2, 150, 16), torch.randn(2, 2, 150, 16)
    store = make_store("int4")
    fill(store, keys, values, [70, 100])
    for found, expected in zip(store.read(stop), store.read(), strict=True):
        assert torch.equal(found, expected[:, :, :stop])


@pytest.mark.parametrize("window", [1, 30, 128])
def test_the_newest_tokens_stay_exact(window):
    keys, values = torch.randn(2, 2, 200, 16), torch.randn(2, 2, 200, 16)
    store = make_store("int4", residual_length=window)
    fill(store, keys, values, [5, 6, 150])
    for found, exact, coded in zip(store.read(), (keys, values), dequantized(store, keys, values), strict=True):
        assert torch.equal(found[:, :, -window:], exact[:, :, -window:])
        assert torch.equal(found[:, :, :-window], coded[:, :, :-window])


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("chunks", [[], [1, 2, 3], [10, 25]], ids=["at once", "one by one", "chunks"])
def test_the_first_real_tokens_stay_exact_behind_any_padding(chunks, window):
    batch, tokens, sinks = 3, 100, 4
    keys, values = torch.randn(batch, 2, tokens, 16), torch.randn(batch, 2, tokens, 16)
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[1, :17] = False
    valid[2, :2] = False
    store = make_store("int3 sparse", sinks=sinks, residual_length=window)
    start = 0
    for stop in [*chunks, tokens]:
        store.append(keys[:, :, start:stop], values[:, :, start:stop], valid[:, start:stop])
        start = stop
    found = store.read()[0]
    for row, first in enumerate((0, 17, 2)):
        assert torch.equal(found[row, :, first : first + sinks], keys[row, :, first : first + sinks])
        assert store.sinks.index[row].tolist() == list(range(first, first + sinks))
    assert not torch.equal(found[0, :, sinks : tokens - window], keys[0, :, sinks : tokens - window])


@pytest.mark.parametrize("name", AT_ONCE)
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("missing", [1, 64, 127])
def test_beginning_late_equals_appending_and_evicting_all(name, window, missing):
    keys, values = torch.randn(2, 3, 1, 200, 80)
    valid = torch.ones(3, 200, dtype=torch.bool)
    valid[1, :3], valid[2, :190] = False, False
    whole, late = (make_store(name, sinks=2, residual_length=window) for _ in range(2))
    whole.append(keys, values, valid)
    begin_late(late, keys[:, :, missing:], values[:, :, missing:], missing, valid)
    assert late.length == 200 and late.oldest == missing and late.first == missing // BLOCK * BLOCK
    assert torch.equal(late.sinks.index, whole.sinks.index)
    for found, expected in zip(late.read(), whole.read(), strict=True):
        assert torch.equal(found[:, :, missing - late.first :], expected[:, :, missing:])
    with pytest.raises(CacheUseError, match=f"has evicted its first {missing} tokens"):
        late.require_croppable(100, missing - 1)
    late.require_croppable(200, missing)


@pytest.mark.parametrize("name", AT_ONCE)
def test_select_shares_blocks_and_re_encodes_nothing(name):
    keys, values = torch.randn(3, 2, 150, 56), torch.randn(3, 2, 150, 56)
    store = make_store(name, sinks=2)
    fill(store, keys, values, [64])
    before = store.read()
    rows = torch.tensor([2, 0, 2, 1])
    pages = {id(column.page) for column in store.blocks.columns}
    store.select(rows)
    assert {id(column.page) for column in store.blocks.columns} == pages
    for found, expected in zip(store.read(), before, strict=True):
        assert torch.equal(found, expected[rows])
    more = torch.randn(4, 2, 70, 56)
    store.append(more, more)
    for found, expected in zip(store.read(150), before, strict=True):
        assert torch.equal(found, expected[rows])


@pytest.mark.parametrize("name", AT_ONCE)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 100, 129, 149])
def test_crop_keeps_what_is_left_bit_for_bit(name, length):
    keys, values = torch.randn(2, 2, 150, 56), torch.randn(2, 2, 150, 56)
    store = make_store(name, sinks=2)
    fill(store, keys, values, [64])
    before = store.read()
    store.crop(length)
    assert store.length == length
    more = torch.randn(2, 2, 90, 56)
    store.append(more, more)
    assert store.length == length + 90
    for found, expected in zip(store.read(), before, strict=True):
        assert torch.equal(found[:, :, :length], expected[:, :, :length])


def test_appending_copies_nothing_that_is_sealed():
    store = make_store("int4")
    keys = torch.randn(1, 2, 640, 16)
    store.append(keys, keys)
    addresses = [plane.data_ptr() for column in store.blocks.columns for plane in column.page.keys.planes]
    for _ in range(200):
        store.append(keys[:, :, :1], keys[:, :, :1])
    assert [plane.data_ptr() for column in store.blocks.columns[:10] for plane in column.page.keys.planes] == addresses


def test_another_shape_is_refused():
    store = make_store("int4")
    store.append(torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16))
    with pytest.raises(CacheUseError, match="batch 2, 2 KV heads of 16, but got batch 3"):
        store.append(torch.randn(3, 2, 1, 16), torch.randn(3, 2, 1, 16))
    with pytest.raises(CacheUseError, match="nothing to read"):
        make_store("int4").read()


def test_reset_empties_the_cache():
    store = make_store("int4", sinks=1)
    store.append(torch.randn(2, 2, 70, 16), torch.randn(2, 2, 70, 16))
    store.reset()
    assert store.length == 0
    assert store.tensors() == []
    store.append(torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["exact", "int4"])
def test_nan_and_infinity_are_refused_and_leave_the_store_as_it_was(name, bad):
    store, x = make_store(name), torch.randn(1, 1, 70, 8)
    store.append(x, x)
    before, broken = store.read(), x.clone()
    broken[0, 0, 2, 3] = bad
    for pair in ((broken, x), (x, broken)):
        with pytest.raises(ActivationError, match="NaN or infinity"):
            store.append(*pair)
    assert all(torch.equal(*sides) for sides in zip(store.read(), before, strict=True))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("position", [0, 30, 150, 299])
def test_an_append_that_overflows_float16_is_rolled_back(side, window, position):
    store, x = make_store("int3 sparse", residual_length=window), torch.randn(1, 2, 100, 8)
    store.append(x, x)
    before, pair = store.read(), [torch.randn(1, 2, 320, 8) for _ in range(2)]
    pair[side][0, 1, position] = torch.linspace(-1e6, 1e6, 8)
    with pytest.raises(ActivationError, match="exceed the range"):
        store.append(*pair)
    assert store.length == 100
    store.append(x, x)
    for found, old in zip(store.read(), before, strict=True):
        assert torch.equal(found[:, :, : 100 - window], old[:, :, : 100 - window])


@pytest.mark.parametrize("name", SCHEMES)
def test_eviction_frees_memory_and_leaves_the_rest_unchanged(name):
    keys, values = torch.randn(2, 2, 1000, 16), torch.randn(2, 2, 1000, 16)
    store = make_store(name, sinks=1)
    store.append(keys[:, :, :900], values[:, :, :900])
    before, whole = store.read(), sum(tensor.untyped_storage().nbytes() for tensor in store.tensors())
    store.evict(799)
    assert store.first == 768 and store.length == 900
    assert next(start for start, _, _ in store.tiles()) == 768
    assert sum(tensor.untyped_storage().nbytes() for tensor in store.tensors()) < 0.3 * whole
    for found, old in zip(store.read(), before, strict=True):
        assert torch.equal(found, old[:, :, 768:])
    store.append(keys[:, :, 900:], values[:, :, 900:])
    store.crop(850)
    for found, old in zip(store.read(), before, strict=True):
        assert torch.equal(found, old[:, :, 768:850])
    with pytest.raises(CacheUseError, match="evicted its first 768"):
        store.crop(700)
    store.crop(0)
    assert store.length == 0 and store.first == 0


@pytest.mark.parametrize("name", ["int4", "int3 sparse", "grouped", "streams"])
def test_the_way_of_one_token_is_short(name):
    """However fast each function is, every call takes time, and who reads the code follows them all."""
    streams = made_streams((1, 2, 1, 16), outliers=0.02, learned_rotation=False)
    store = LayerStore(streams, streams) if name == "streams" else make_store(name)
    for tokens in (3, 1):  # what is made once is there afterwards
        store.append(*torch.randn(2, 1, 2, tokens, 16))
    keys, values = torch.randn(2, 1, 2, 1, 16)
    package, calls, profiled = str(Path(narrowkv.__file__).parent), [], sys.getprofile()
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code) if event == "call" else None)
    try:
        store.append(keys, values)
    finally:
        sys.setprofile(profiled)
    ours = [code.co_filename for code in calls if code.co_filename.startswith(package)]
    assert 0 < len(ours) <= 10 and len(set(ours)) <= 7
