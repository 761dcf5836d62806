"""Each peer's quantizer against its definition, element by element, and what it costs."""

import itertools
import math

import pytest
import torch
from benchmarks.peer_methods import block_gtq, kvarn, oscar, oscar_norms, quantized_cache, turboquant, wush_kv
from benchmarks.peer_methods.base import Statistics, affine, haar, hadamard, lloyd_max, nearest

HEADS, TOKENS, SIZE = 2, 63, 64


def elements(heads=HEADS, tokens=TOKENS, size=SIZE):
    """Channels of very different spread, and an offset."""
    spread = torch.linspace(-2, 2, size).exp()
    return torch.randn(heads, tokens, size) * spread + spread.flip(0) / 4


@pytest.fixture
def statistics():
    queries, outputs = torch.randn(2, HEADS, 500, SIZE).double() * torch.rand(SIZE)
    return Statistics(queries.mT @ queries / 500, elements(tokens=500), elements(tokens=500), outputs.mT @ outputs / 500)


def test_affine_ranges_span_minimum_to_maximum():
    x = torch.tensor([[0.0, 1.0, 2.0, 3.1, 4.0, 6.0]])
    assert torch.allclose(affine(x, 2, -1), torch.tensor([[0.0, 0.0, 2.0, 4.0, 4.0, 6.0]]))
    assert torch.equal(affine(torch.full((2, 5), 3.0), 2, -1), torch.full((2, 5), 3.0))


def test_hadamard_is_its_own_inverse_and_refuses_other_sizes():
    assert torch.allclose(hadamard(64) @ hadamard(64), torch.eye(64), atol=1e-6)
    with pytest.raises(ValueError, match="80 channels"):
        hadamard(80)


def test_haar_is_orthogonal_and_comes_from_its_seed():
    assert torch.allclose(haar(10, 1) @ haar(10, 1).mT, torch.eye(10), atol=1e-6)
    assert not torch.allclose(haar(10, 1), haar(10, 2))


@pytest.mark.parametrize(
    ("bits", "levels"), [(1, [0.7979]), (2, [0.4528, 1.5104]), (3, [0.2451, 0.7560, 1.3439, 2.1520])], ids=str
)
def test_lloyd_max_has_the_levels_of_the_literature(bits, levels):
    expected = torch.tensor([-level for level in reversed(levels)] + levels)
    assert torch.allclose(lloyd_max(bits), expected, atol=1e-4)


def test_nearest_equals_an_exhaustive_search():
    x, levels = torch.randn(100), lloyd_max(3)
    assert torch.equal(nearest(x, levels), levels[(x[:, None] - levels).abs().argmin(1)])


@pytest.mark.parametrize("width", [2, 3, 4])
def test_turboquant_keys_are_levels_of_a_rotated_unit_vector_of_the_same_norm(width):
    x = elements()
    left = turboquant.Keys(width)(x)
    assert torch.allclose(left.norm(dim=-1), x.norm(dim=-1), rtol=1e-3)
    for head, token in ((0, 0), (1, 62)):
        turned = hadamard(SIZE) @ x[head, token]
        levels = nearest(turned / turned.norm() * math.sqrt(SIZE), lloyd_max(width))
        expected = hadamard(SIZE) @ levels * x[head, token].norm() / levels.norm()
        assert torch.allclose(left[head, token], expected, rtol=2e-3, atol=2e-3)


def test_turboquant_values_are_uniform_between_the_extremes_of_a_token():
    x = elements()
    step = (x.amax(-1) - x.amin(-1)) / 7
    error = (turboquant.Values(3)(x) - x).abs().amax(-1)
    assert (error <= step * 0.51).all() and (error > step * 0.3).all()


def test_block_gtq_gives_bits_where_they_help_most():
    scores = torch.tensor([1.0, 3.0, 20.0, 400.0], dtype=torch.float64)
    found = block_gtq.allocate(scores, 9)

    def lost(bits):
        return sum(score * 4.0**-b for score, b in zip(scores.tolist(), bits, strict=True))

    best = min((bits for bits in itertools.product(range(1, 9), repeat=4) if sum(bits) == 9), key=lost)
    assert found.tolist() == list(best)
    assert block_gtq.allocate(torch.tensor([1.0, 1e9]), 9).tolist() == [1, 8]  # 8 at most
    assert block_gtq.allocate(torch.tensor([0.0, 0.0]), 16).tolist() == [8, 8]


def test_block_gtq_scores_rotary_pairs_by_queries_and_keys(statistics):
    keys = block_gtq.Keys(statistics, 3)
    pair = statistics.queries[1, 5, 5] + statistics.queries[1, 37, 37]
    pair = (pair + statistics.keys[1, :, [5, 37]].double().square().sum(-1).mean()) / 2
    weaker = statistics.queries[1].diagonal() + statistics.keys[1].double().square().mean(0)
    weaker = (weaker[:32] + weaker[32:]) / 2 <= pair
    assert (keys.allocation[1][weaker] <= keys.allocation[1][5]).all()
    assert keys.allocation.sum(1).tolist() == [96, 96]


def test_block_gtq_keys_keep_the_norms_of_groups(statistics):
    keys, x = block_gtq.Keys(statistics, 2), elements()
    left = keys(x)
    for head, pairs in enumerate(keys.allocation.repeat(1, 2)):
        assert len(pairs.unique()) > 1
        for width in pairs.unique():
            norms = [part[head][:, pairs == width].norm(dim=-1) for part in (left, x)]
            assert torch.allclose(*norms, rtol=1e-3)
    errors = [(block_gtq.Keys(statistics, width)(x) - x).square().mean() for width in (2, 3, 4)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_block_gtq_values_are_turboquant_without_norm_correction():
    x = elements()
    left, rotation = block_gtq.Values(3)(x), haar(SIZE, 1001)
    norm = x[1, 7].norm()
    expected = rotation.mT @ nearest(rotation @ x[1, 7] / norm * 8, lloyd_max(3)) / 8 * norm
    assert torch.allclose(left[1, 7], expected, rtol=2e-3, atol=2e-3)


def test_oscar_rotates_so_that_all_channels_are_alike(statistics):
    moment = statistics.queries.mean(0)
    rotation = oscar.rotation(moment).double()
    assert torch.allclose(rotation.mT @ rotation, torch.eye(SIZE).double(), atol=1e-5)
    spread = (rotation.mT @ moment @ rotation).diagonal()
    assert torch.allclose(spread, spread.mean().expand(SIZE), rtol=1e-4)


def test_oscar_weighs_values_by_the_energy_of_their_keys(statistics):
    statistics.keys[:, :200], statistics.keys[:, 200:] = statistics.keys[:, :1].clone(), 0
    values = statistics.values[:, :200].double()
    moment = (values.mT @ values / 200).mean(0)
    rotation = oscar.fit(statistics)[1].rotation.double()
    spread = (rotation.mT @ moment @ rotation).diagonal()
    assert torch.allclose(spread, spread.mean().expand(SIZE), rtol=1e-3)


def test_oscar_clips_each_token_before_it_rounds():
    x = elements(tokens=3, size=256)
    left = oscar.Rotated(torch.eye(256), 0.96, folded=False)(x)
    for head, token in itertools.product(range(HEADS), range(3)):
        row = x[head, token]
        limit = row.abs().sort().values[int(0.96 * 256)]
        for group in (slice(0, 128), slice(128, 256)):
            expected = affine(row[group].clamp(-limit, limit), 2, -1)
            assert torch.allclose(left[head, token, group], expected)
    assert len(left[0, 0, :128].unique()) == 4


def test_oscar_norms_factors_the_norm_over_all_heads_out():
    x = elements()
    left = oscar_norms.Keys()(x) @ hadamard(SIZE)
    norms = x.transpose(0, 1).flatten(1).norm(dim=1)
    for head, channel, start in ((0, 0, 0), (1, 33, 32)):
        group = (x @ hadamard(SIZE))[head, start : start + 32, channel] / norms[start : start + 32]
        scale = ((group.max() - group.min()) / 3).half().float()
        zero = (-group.min() / scale).round()
        codes = ((group / scale).round() + zero).clamp(0, 3)
        expected = (codes - zero) * scale * norms[start : start + 32]
        assert torch.allclose(left[head, start : start + 32, channel], expected, rtol=2e-3, atol=2e-3)


def test_oscar_norms_keeps_values_in_groups_of_channels():
    x = elements()
    left = (oscar_norms.Values()(x) @ hadamard(SIZE)).unflatten(-1, (2, 32))
    turned = (x @ hadamard(SIZE)).unflatten(-1, (2, 32))
    step = (turned.amax(-1) - turned.amin(-1)) / 3
    assert ((left - turned).abs().amax(-1) <= step * 1.01).all()
    assert max(len((row / row.abs().max()).round(decimals=4).unique()) for row in left.flatten(0, 2)) == 4


def naive_variance_scales(tile):
    """For one tile [rows, columns]."""
    log_columns, log_rows = torch.zeros(tile.shape[1]), torch.zeros(tile.shape[0])
    rounds = []
    for step in range(17):
        even = tile / log_columns.exp() / log_rows.exp()[:, None]
        deviations = [even.std(dim) for dim in (0, 1)]
        rounds.append((sum(d.max() / d.min() for d in deviations), -step, log_columns.exp(), log_rows.exp()))
        log_columns = (log_columns + deviations[0].clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
        even = tile / log_columns.exp() / log_rows.exp()[:, None]
        log_rows = (log_rows + even.std(1).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
    return min(rounds, key=lambda found: found[:2])[2:]


def test_kvarn_evens_the_variances_of_rows_and_columns():
    tiles = elements(heads=3)
    columns, rows = kvarn.variance_scales(tiles)
    assert (kvarn.imbalance(tiles / columns / rows) < kvarn.imbalance(tiles) / 2).all()
    for tile, *scales in zip(tiles, columns[:, 0], rows[..., 0], strict=True):
        for found, expected in zip(scales, naive_variance_scales(tile), strict=True):
            assert torch.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("by_channel", [True, False], ids=["keys", "values"])
def test_kvarn_rounds_keys_by_channel_and_values_by_token(by_channel):
    x = elements(heads=1, tokens=191)  # a full tile and a short one
    left = kvarn.Tiles(4, by_channel)(x) @ hadamard(SIZE)
    for tokens in (slice(0, 128), slice(128, 191)):
        parts = [(x @ hadamard(SIZE))[0, tokens], left[0, tokens]]
        tile, decoded = (part.mT if by_channel else part for part in parts)
        columns, rows = naive_variance_scales(tile)
        even = tile / columns / rows[:, None]
        expected = affine(even, 4, 1) * columns * rows[:, None]
        step = (even.amax(1) - even.amin(1)) / 15 * rows
        assert ((decoded - expected).abs() <= 1.01 * step[:, None] * columns).all()  # 16-bit scales may rotate a code
        assert ((decoded - expected).abs() > 0.05 * step[:, None] * columns).float().mean() < 0.02


def test_wush_kv_makes_both_sides_alike(statistics):
    cached = statistics.keys.double().mT @ statistics.keys.double() / 500
    rotation = wush_kv.transform(cached, statistics.queries)
    back = torch.linalg.inv(rotation)
    sides = [rotation @ cached @ rotation.mT, back.mT @ statistics.queries @ back]
    for side in sides:
        spread = side.diagonal(dim1=1, dim2=2)
        assert torch.allclose(spread, spread.mean(1, keepdim=True).expand_as(spread), rtol=0.1)
    assert torch.allclose(*(side.diagonal(dim1=1, dim2=2).mean(1) for side in sides), rtol=0.1)


@pytest.mark.parametrize(("width", "step"), [(2, 0.9957), (3, 0.5860), (4, 0.3352)])
def test_wush_kv_rounds_to_levels_without_a_zero(width, step):
    x = torch.randn(HEADS, TOKENS, SIZE)
    left = wush_kv.Transformed(torch.eye(SIZE).expand(HEADS, -1, -1), width, folded=False)(x)
    steps = step * x.square().mean(-1, keepdim=True).sqrt()  # the best ones for a Gaussian
    most = (2**width - 1) / 2
    codes = ((x / steps + most).round().clamp(0, 2 * most) - most) * steps
    assert ((left - codes).abs() < 0.02).float().mean() > 0.99
    assert (left != 0).all() and (left.abs() <= steps * most * 1.01).all()


def test_wush_kv_multiplies_by_a_transform_and_its_inverse(statistics):
    keys, values = wush_kv.fit(statistics, 4)
    for side, x in ((keys, statistics.keys), (values, statistics.values)):
        assert torch.allclose(side.back @ side.rotation, torch.eye(SIZE).expand(HEADS, -1, -1), atol=1e-3)
        assert (side(x) - x).square().mean() < 0.05 * x.square().mean()


@pytest.mark.parametrize("width", [4, 2])
def test_quanto_rounds_64_neighboring_channels(width):
    x = elements(size=128)
    left = quantized_cache.Quanto(width)(x)
    for head, token, group in ((0, 0, 0), (1, 62, 1)):
        row = x[head, token, 64 * group : 64 * group + 64]
        scale = (row.max() - row.min()) / (2**width - 1)
        expected = ((row - row.min()) / scale).round() * scale + row.min()
        assert torch.allclose(left[head, token, 64 * group : 64 * group + 64], expected)


def test_hqq_groups_elements_that_lie_far_apart(monkeypatch):
    monkeypatch.setattr(quantized_cache, "STEPS", 0)
    x = elements()
    left, apart = quantized_cache.Hqq(4)(x).flatten(), x.numel() // 64
    for first in (0, 5, apart - 1):
        group = x.flatten()[first::apart]
        scale = 15 / (group.max() - group.min())
        expected = ((group * scale - group.min() * scale).round() + group.min() * scale) / scale
        assert torch.allclose(left[first::apart], expected, atol=1e-4)


def test_hqq_refines_zero_points(monkeypatch):
    x = elements()
    refined = (quantized_cache.Hqq(2)(x) - x).abs().pow(0.7).mean()
    monkeypatch.setattr(quantized_cache, "STEPS", 0)
    assert refined < 0.99 * (quantized_cache.Hqq(2)(x) - x).abs().pow(0.7).mean()


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (turboquant.Keys(3), 3 + 16 / 64),
        (turboquant.Values(3), 3 + 32 / 64),
        (block_gtq.Values(2), 2 + 16 / 64),
        (oscar.Rotated(torch.eye(64), 0.96, folded=False), 2 + 32 / 64),
        (oscar_norms.Keys(), 2 + 32 / 32 + 16 / 128),
        (oscar_norms.Values(), 2 + 32 / 32),
        (kvarn.Tiles(4, by_channel=True), 4 + 32 / 128 + 16 / 64),
        (kvarn.Tiles(2, by_channel=False), 2 + 32 / 64 + 16 / 128),
        (quantized_cache.Quanto(4), 4.5),
        (quantized_cache.Hqq(2), 2.5),
    ],
    ids=lambda part: str(part) if isinstance(part, float) else type(part).__module__.rsplit(".", 1)[-1],
)
def test_bits_count_codes_ranges_and_outliers(side, expected):
    assert side.bits(2, 64) == expected
    assert side.tables(2, 64) == (16 * 64 * 64 if isinstance(side, oscar.Rotated) else 0)


def test_bits_of_what_is_fitted(statistics):
    keys, values = wush_kv.fit(statistics, 3)
    assert keys.bits(2, 64) == values.bits(2, 64) == 3 + 16 / 64
    assert (keys.tables(2, 64), values.tables(2, 64)) == (2 * 2 * 16 * 64 * 64, 0)
    coded = block_gtq.Keys(statistics, 3)
    coded.allocation = torch.tensor([[3] * 32, [2] * 16 + [4] * 16])  # one group, and two
    assert coded.bits(2, 64) == 3 + 1.5 * 16 / 64
    assert coded.tables(2, 64) == 2 * 32 * 3
    assert oscar.fit(statistics)[1].tables(2, 64) == 0
