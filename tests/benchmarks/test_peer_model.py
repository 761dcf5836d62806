"""Models that attend to what a method leaves, what stays exact, true bits, and files that go on."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from benchmarks.peer_methods.base import Quantizer
from benchmarks.peer_model import (
    Shape,
    Terms,
    attend_by,
    attending,
    attention,
    collect,
    leave,
    mixed_attention,
    true_bits,
)

from benchmarks import peers
from narrowkv.errors import OutputError

KEYS, VALUES = 3, 5


class Plus(Quantizer):
    """Adds a number; 0 leaves all as it is."""

    def __init__(self, added, bits=2.0, tables=0):
        self.added, self.width, self.stored = added, bits, tables

    def __call__(self, x):
        return x + self.added

    def bits(self, kv_heads, head_dim):
        return self.width

    def tables(self, kv_heads, head_dim):
        return self.stored


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (Terms(), ["....", ".#..", ".##.", ".###"]),
        (Terms(sinks=0), ["#...", "##..", "###.", "####"]),
        (Terms(sinks=1, recent=2), ["....", "....", "....", ".#.."]),
        (Terms(sinks=0, tile=2), ["....", "##..", "##..", "####"]),
        (Terms(sinks=1, tile=2), ["....", "....", ".##.", ".##."]),
    ],
    ids=str,
)
def test_terms_say_what_a_decoded_token_reads_quantized(terms, expected):
    causal = terms.quantized(4).tril()
    assert ["".join("#" if coded else "." for coded in row) for row in causal] == expected


@pytest.mark.parametrize("terms", [Terms(2, recent=3), Terms(2, tile=4), Terms(0, tile=8), Terms(90, tile=8)], ids=str)
def test_leave_replaces_what_a_decoded_token_reads_quantized(terms):
    x = torch.randn(1, 63, 8)
    left = leave((Plus(1), Plus(2)), (x, x), terms)
    for part, added in zip(left, (1, 2), strict=True):
        coded = ((part - x) > 0.5).all(-1)[0]
        assert torch.allclose(part, x + added * coded[:, None])
        assert coded[terms.quantized(63).tril().any(0)].all()
        assert not coded[: terms.sinks].any()


def test_mixed_attention_is_that_of_each_token_alone():
    tokens, queries = 300, torch.randn(4, 300, 16)
    keys, values, left_keys, left_values = torch.randn(4, 2, tokens, 16)
    mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
    coded = Terms(sinks=3, recent=40).quantized(tokens)
    found = mixed_attention(queries, (keys, values), (left_keys, left_values), coded, mask, 0.3)
    for head, token in ((0, 0), (1, 41), (2, 150), (3, 299)):
        seen = slice(0, token + 1)
        chosen = coded[token, seen, None]
        k, v = (
            torch.where(chosen, a[head // 2, seen], b[head // 2, seen]) for a, b in ((left_keys, keys), (left_values, values))
        )
        expected = (k @ queries[head, token] * 0.3).softmax(0) @ v
        assert torch.allclose(found[head, token], expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("terms", [Terms(), Terms(2, recent=7), Terms(0, tile=8), Terms(0, boundary=1)], ids=str)
def test_attention_over_unchanged_keys_and_values_is_exact(tiny, family, terms):
    model = tiny(family, layers=3)
    ids = torch.randint(1, 97, (1, 63))
    before = model.config._attn_implementation
    with torch.inference_mode():
        exact = model(ids).logits
        with attending(model, attend_by([(Plus(0), Plus(0))] * 3, terms, 63)):
            assert torch.allclose(model(ids, use_cache=False).logits, exact, atol=2e-4)
        with attending(model, attend_by([(Plus(0), Plus(1))] * 3, terms, 63)):
            assert not torch.allclose(model(ids, use_cache=False).logits, exact, atol=1e-2)
        with attending(model, attend_by([(Plus(0), Plus(1))] * 3, Terms(0, boundary=2), 63)):
            assert torch.allclose(model(ids, use_cache=False).logits, exact, atol=2e-4)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_statistics_are_of_stored_elements(tiny, family):
    model = tiny(family)
    windows = torch.randint(1, 97, (3, 20))
    found = collect(model, windows)
    with torch.inference_mode():
        caches = [model(ids[None], use_cache=True).past_key_values.layers for ids in windows]
    for layer, statistics in enumerate(found):
        for name in ("keys", "values"):
            expected = torch.cat([getattr(cache[layer], name)[0, :, 1:] for cache in caches], 1)
            assert torch.allclose(getattr(statistics, name), expected, atol=1e-4)
        weight = model.model.layers[layer].self_attn.o_proj.weight.double()
        columns = weight[:, 32:64]  # heads 2 and 3 read the second of two kv heads
        expected = sum(part.mT @ part for part in columns.split(16, 1)) / (2 * len(weight))
        assert torch.allclose(statistics.output[1], expected)


def test_statistics_have_the_queries_of_each_group(tiny):
    model = tiny("llama", layers=1)
    seen = []

    def capture(layer, queries, keys, values, mask, scaling):
        seen.append(queries[:, 1:])
        return attention(queries, keys, values, mask, scaling)

    windows = torch.randint(1, 97, (2, 20))
    (statistics,) = collect(model, windows)
    with torch.inference_mode(), attending(model, capture):
        for ids in windows:
            model(ids[None], use_cache=False)
    rows = torch.cat([queries[2:].flatten(0, 1) for queries in seen]).double()
    assert torch.allclose(statistics.queries[1], rows.mT @ rows / len(rows), atol=1e-6)


def test_true_bits_count_sinks_recent_tokens_and_tables():
    shape = Shape(2, 8, stored=(32768, 512), whole=(True, False))
    pairs = [(Plus(0, KEYS, tables=16 * 1000), Plus(0, VALUES))] * 2
    found = true_bits(pairs, Terms(sinks=64, recent=256), shape)
    elements = 2 * 16 * (32768 + 512)
    exact = 16 * 2 * 16 * (320 + 256)  # the window has no sinks
    coded = 16 * (KEYS + VALUES) * (32768 + 512 - 320 - 256)
    assert found["bits_exact"] == pytest.approx(exact / elements)
    assert found["bits_tables"] == pytest.approx(2 * 16 * 1000 / elements)
    assert found["bits"] == pytest.approx((exact + coded + 2 * 16 * 1000) / elements)


def test_true_bits_of_exact_layers_and_of_tails():
    shape = Shape(1, 8, stored=(32768,) * 3, whole=(True,) * 3)
    pairs = [(Plus(0, 4, tables=80), Plus(0, 4))] * 3
    found = true_bits(pairs, Terms(sinks=0, boundary=1), shape)
    assert found["bits_exact"] == pytest.approx(16 * 2 / 3)
    assert found["bits_tables"] == pytest.approx(80 / (8 * 2 * 3 * 32768))
    assert true_bits(pairs, Terms(sinks=0, tile=128), shape)["bits_exact"] == pytest.approx(16 * 63.5 / 32768)


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(out=tmp_path, windows=2, long=2048, peers=["OSCAR, 2 bits", "KVarN, K4V2"])


@pytest.fixture
def subject(monkeypatch, statistics):
    """Instead of a model: all metrics are of the terms."""

    def divergence(pairs, terms, name):
        return {"encyclopedia": terms.sinks / 1000, "code": len(pairs) / 10}

    shape = Shape(2, 16, stored=(32768,), whole=(True,))
    made = []
    monkeypatch.setattr(
        peers,
        "Subject",
        lambda *given: made.append(given) or SimpleNamespace(statistics=[statistics], shape=shape, divergence=divergence),
    )
    return made


@pytest.fixture
def statistics(tiny):
    return collect(tiny("llama", layers=1), torch.randint(1, 97, (2, 40)))[0]


def test_a_file_goes_on_where_it_was_interrupted(options, subject, capsys):
    options.peers = ["KVarN, K4V2"]
    peers.run("models/tiny", options)
    options.peers = ["OSCAR, 2 bits", "KVarN, K4V2"]
    peers.run("models/tiny", options)
    rows = json.loads((options.out / "tiny.json").read_text())["rows"]
    named = [(row["peer"], row["terms"], row["encyclopedia"]) for row in rows]
    assert named == [
        ("KVarN, K4V2", "ours", 0.001),
        ("KVarN, K4V2", "published", 0.128),
        ("OSCAR, 2 bits", "ours", 0.001),
        ("OSCAR, 2 bits", "published", 0.064),
    ]
    peers.run("models/tiny", options)
    assert subject == [("models/tiny", 2, 2048)] * 2  # a third was not needed
    assert "| ours | KVarN, K4V2 | 4.6" in peers.table(options.out)
    options.windows = 4
    with pytest.raises(OutputError, match="other settings"):
        peers.run("models/tiny", options)
