"""Codebooks of channels and pairs against the definition, written again in a few plain lines."""

import pytest
import torch

from narrowkv.codec import PointQuantizer, Scheme
from narrowkv.codec.points import from_vectors, moments, moments_naive, nearest, nearest_naive, to_vectors
from narrowkv.errors import ActivationError, RecipeError

SHAPES = [(1, 1, 63, 80), (3, 2, 64, 16), (2, 4, 1, 8)]


def scheme(codebook, bits, outliers=0.0, turn=False, cap=None):
    return Scheme(bits, "nuq", axis="channel", codebook=codebook, outliers=outliers, turn=turn, outlier_cap=cap)


def tables(scheme, heads, dim, limit=1.0):
    codes = dim // scheme.numbers
    return {
        "points": torch.randn(heads, codes, 2**scheme.code_bits, scheme.numbers).half(),
        "weight": torch.rand(heads, codes, scheme.numbers) + 0.1,
        "limit": torch.tensor([limit]) if scheme.outliers else None,
        "turn": torch.linalg.qr(torch.randn(heads, dim, dim)).Q.half() if scheme.turn else None,
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("codebook", "bits"), [("channel", 2), ("channel", 3), ("channel", 4), ("pair", 1.5), ("pair", 2.5), ("pair", 4)]
)
@pytest.mark.parametrize("outliers", [0.0, 0.01])
@pytest.mark.parametrize("turn", [False, True])
def test_a_code_names_the_point_that_costs_least(shape, codebook, bits, outliers, turn):
    x = torch.randn(shape)
    found = PointQuantizer(
        scheme(codebook, bits, outliers, turn), **tables(scheme(codebook, bits, outliers, turn), *shape[1::2])
    )
    encoded = found.encode(x)
    batch, heads, tokens, dim = shape
    seen = x if not turn else (x.double() @ found.turn.double()).float()
    half = dim // found.scheme.numbers
    expected = torch.empty_like(seen)
    kept = 0
    for head in range(heads):
        for code in range(half):
            channels = [code] if codebook == "channel" else [code, code + half]
            numbers = seen[:, head][..., channels]  # [batch, tokens, numbers]
            missed = (numbers[:, :, None] - found.points[head, code].float()) ** 2 * found.weight[head, code]
            cost, nearest = missed.sum(-1).min(-1)
            decoded = found.points[head, code].float()[nearest]
            if outliers:
                decoded = torch.where((cost > 1.0)[..., None], numbers.half().float(), decoded)
                kept += int((cost > 1.0).sum())
            expected[:, head][..., channels] = decoded
    if turn:
        expected = expected @ found.turn.float().transpose(1, 2)
    torch.testing.assert_close(found.decode(encoded), expected, atol=2e-5, rtol=1e-5)
    assert encoded.codes.shape == (batch, heads, tokens, half) and not encoded.ranges
    assert (0 if encoded.outlier_values is None else len(encoded.outlier_values)) == kept


def test_codes_do_not_depend_on_how_many_tokens_come_at_once():
    kind = scheme("pair", 3, 0.01, turn=True)
    quantizer = PointQuantizer(kind, **tables(kind, 4, 64))
    x = torch.randn(1, 4, 200, 64)
    together = quantizer.encode(x).codes
    singly = torch.cat([quantizer.encode(x[:, :, i : i + 1]).codes for i in range(200)], dim=2)
    assert torch.equal(together, singly)


def test_vectors_are_channels_half_a_head_apart():
    x = torch.arange(8.0)
    assert to_vectors(x, 2).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]] and to_vectors(x, 1).tolist() == [
        [i] for i in range(8)
    ]
    assert torch.equal(from_vectors(to_vectors(x, 2)), x)


def test_a_cap_keeps_the_outliers_that_cost_most_and_skipped_tokens_have_none():
    kind = scheme("pair", 2, 0.01, cap=3)
    quantizer = PointQuantizer(kind, **tables(kind, 2, 32, limit=0.01))
    x = torch.randn(2, 2, 9, 32)
    skip = torch.zeros(2, 9, dtype=torch.bool)
    skip[1, 4] = True
    where = torch.unravel_index(quantizer.encode(x, skip).outlier_index, (2, 2, 9, 16))
    counts = torch.zeros(2, 9).index_put_((where[0], where[2]), torch.ones(1), accumulate=True)
    assert counts[1, 4] == 0 and (counts[~skip] == 3).all()
    _, cost = quantizer.nearest(x)
    assert (0, 0) in zip(where[0].tolist(), where[2].tolist(), strict=True)
    kept = cost[0, :, 0][where[1][(where[0] == 0) & (where[2] == 0)], where[3][(where[0] == 0) & (where[2] == 0)]]
    assert kept.min() >= cost[0, :, 0].flatten().topk(3).values.min()


def test_heads_can_be_divided_and_tables_moved():
    kind = scheme("pair", 2, 0.01, turn=True)
    whole = PointQuantizer(kind, **tables(kind, 4, 16))
    x = torch.randn(2, 4, 5, 16)
    part = whole.of_heads(1, 2).to(torch.device("cpu"))
    assert torch.equal(part.encode(x[:, 1:3]).codes, whole.encode(x).codes[:, 1:3])
    assert set(part.tensors()) == {"points", "weight", "limit", "turn"}


def test_tables_that_do_not_fit_are_refused():
    kind = scheme("pair", 2, turn=True)
    good = tables(kind, 2, 16)
    for wrong in (
        good | {"turn": None},
        good | {"weight": torch.ones(2, 8, 1)},
        good | {"points": good["points"][:, :, :8]},
        good | {"limit": torch.ones(1)},
    ):
        with pytest.raises(RecipeError, match="calibrate"):
            PointQuantizer(kind, **wrong)


def test_outliers_must_fit_16_bits():
    kind = scheme("channel", 2, 0.01)
    quantizer = PointQuantizer(kind, **tables(kind, 1, 8))
    with pytest.raises(ActivationError, match="float16"):
        quantizer.encode(torch.full((1, 1, 1, 8), 1e6))


@pytest.mark.parametrize("levels", [4, 8, 32, 256])
@pytest.mark.parametrize(("codes", "numbers"), [(1, 1), (4, 2), (16, 1), (40, 2), (128, 1), (64, 2)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 7), (2, 63)])
def test_the_compiled_search_is_exactly_the_plain_one(levels, codes, numbers, batch, tokens):
    points = torch.randn(2, codes, levels, numbers)
    points[:, :, 1] = points[:, :, 0]  # of two points as near, the first
    x = torch.randn(batch, 2, tokens, codes * numbers)
    found, cost = nearest(x, points)
    expected, expected_cost = nearest_naive(x, points)
    assert torch.equal(found, expected) and torch.equal(cost, expected_cost)


@pytest.mark.parametrize(("codes", "count"), [(5, 1), (40, 2)])
def test_compiled_moments_are_the_plain_ones(codes, count):
    numbers, found = torch.randn(3, 70, codes * count), torch.randint(0, 8, (3, 70, codes), dtype=torch.uint8)
    torch.testing.assert_close(moments(numbers, found, 8, count), moments_naive(numbers, found, 8, count))


@pytest.mark.parametrize("shape", [(1, 1, 1, 80), (3, 2, 1, 16), (1, 8, 4, 128)], ids=str)
@pytest.mark.parametrize("codebook", ["channel", "pair"])
def test_few_tokens_get_the_codes_that_they_get_among_many(shape, codebook):
    batch, heads, tokens, dim = shape
    plan = scheme(codebook, 3, outliers=0.01, turn=True)
    quantizer, many = PointQuantizer(plan, **tables(plan, heads, dim)), torch.randn(batch, heads, 64, dim)
    found, expected = quantizer.encode(many[:, :, 7 : 7 + tokens]), quantizer.encode(many)
    assert torch.equal(found.codes, expected.codes[:, :, 7 : 7 + tokens])
    torch.testing.assert_close(quantizer.turned(many[:, :, :tokens]), quantizer.turned(many)[:, :, :tokens])
