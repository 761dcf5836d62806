"""Transforms and tables of trellis-coded streams as calibration makes them."""

import itertools

import pytest
import torch

from narrowkv.calibration.trellis_fit import TrellisFit, transform_of, uncorrelated_axes
from narrowkv.calibration.trellis_tables import additive, on_grid
from narrowkv.codec import Quantization, Scheme

SHAPE = (2, 32)


@pytest.fixture
def fit():
    mixing = torch.randn(32, 32) * torch.logspace(0, -1, 32)
    slopes = torch.randn(32, 32) * torch.logspace(-1, 0, 32)
    x = torch.randn(1500, 2, 32) @ mixing + 5 * torch.randn(2, 32)
    found = TrellisFit()
    found.observe_range(x)
    found.observe_codebook(x, torch.randn_like(x) @ slopes)
    found.observe_drawn(torch.randn_like(x) @ slopes)
    return found


def quantizer(fit, counts, **settings):
    bits = sum(rate * count for rate, count in enumerate(counts)) / sum(counts)
    scheme = Scheme(Quantization(bits, "trellis", strategy="channel", counts=counts)).with_settings(**settings)
    return fit.quantizer(SHAPE, scheme)


@pytest.mark.parametrize("whole", [False, True])
def test_coefficients_are_uncorrelated_and_errors_in_them_cost_alike(fit, whole):
    x, fisher = fit.samples.heads()[0].double(), fit.samples.fisher()
    x = x - x.mean(1, keepdim=True)
    found = transform_of(x, fisher, whole)
    matrix = found.matrix
    if not whole:
        matrix = torch.zeros(2, 32, 32, dtype=torch.float64)
        for pair in range(16):
            matrix[:, [[pair], [pair + 16]], [pair, pair + 16]] = found.matrix[:, pair]
    z = x @ torch.linalg.inv(matrix)
    covariance = z.mT @ z / z.shape[1]
    for pair in range(16):
        assert covariance[:, pair, pair + 16].abs().max() < 1e-6
    shrunk = 1 - 0.03 / 1.03 * found.cost.mean(1, keepdim=True) / found.cost
    torch.testing.assert_close(covariance.diagonal(dim1=1, dim2=2), shrunk)
    axes = torch.eye(32).double().expand(2, -1, -1)
    if whole:
        axes = uncorrelated_axes(torch.stack([torch.cov(head.mT, correction=0) for head in x]), fisher)
    weight = (axes.mT @ fisher @ axes).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(((matrix @ axes) ** 2 * weight[:, None]).sum(-1), found.cost)


def test_axes_are_orthogonal_and_the_dearest_come_first(fit):
    x = fit.samples.heads()[0].double()
    covariance, fisher = torch.stack([torch.cov(head.mT) for head in x]), fit.samples.fisher()
    axes = uncorrelated_axes(covariance, fisher)
    torch.testing.assert_close(axes.mT @ axes, torch.eye(32).double().expand(2, -1, -1))
    costs = [(axes.mT @ part @ axes).diagonal(dim1=1, dim2=2) for part in (covariance, fisher)]
    ascending = (costs[0] * costs[1]).unflatten(1, (2, 16)).mT.flatten(1)
    assert (ascending.diff(dim=1) <= 1e-9 * ascending.max()).all()


def test_higher_rates_and_outliers_cost_less(fit):
    costs = [
        fit.samples.cost(quantizer(fit, counts))
        for counts in ((2, 2, 0, 0, 0, 0, 0), (0, 4, 0, 0, 0, 0, 0), (0, 0, 4, 0, 0, 0, 0), (0, 0, 0, 4, 0, 0, 0))
    ]
    assert all(less < 0.8 * more for more, less in itertools.pairwise(costs))
    assert fit.samples.cost(quantizer(fit, (0, 0, 0, 4, 0, 0, 0), outliers=0.01)) < costs[3]


@pytest.mark.parametrize("settings", [{}, {"learned_rotation": True, "token_norm": True}])
def test_learned_tables_are_on_their_grid_and_better_than_those_of_a_gaussian(fit, settings):
    found = quantizer(fit, (0, 1, 1, 2, 0, 0, 0), **settings)
    found.require_sound()
    assert found.forms(found.scheme, *SHAPE) == {
        name: (tuple(table.shape), table.dtype) for name, table in found.tensors().items()
    }
    assert torch.equal(found.steps, found.scales) != bool(settings)  # values are stretched until codes are unbiased


def test_the_schemes_part_costs_more_than_the_limit(fit):
    found = quantizer(fit, (0, 0, 2, 2, 0, 0, 0), outliers=0.01)
    elements = fit.samples.heads()
    cost = found.cost(elements)
    assert float((cost > found.outlier_threshold).float().mean()) == pytest.approx(0.01, rel=0.1)
    assert 0.008 < len(found.encode(elements).outlier_values) / cost.numel() <= 0.01


def test_drawn_gradients_count_as_much_as_those_of_the_text(fit):
    x, one, other = torch.randn(3, 100, 2, 32)
    found, both = TrellisFit(), TrellisFit()
    found.observe_codebook(x, one)
    found.observe_drawn(other)
    both.observe_codebook(torch.cat([x, x]), torch.cat([one, other]))
    torch.testing.assert_close(found.samples.fisher(), both.samples.fisher())
    assert len(found.samples.elements) == 100


def test_an_additive_table_on_the_grid_is_near_its_sums():
    high, low = torch.randn(2, 16)
    table = (high[:, None] + low).flatten()
    parts = additive(table, torch.ones(256))
    torch.testing.assert_close((parts[0][:, None] + parts[1]).flatten(), table, atol=1e-5, rtol=1e-5)
    entries, steps = on_grid(parts[None])
    sums = entries[0, 0].int()[:, None] + entries[0, 1].int()
    assert entries.dtype == torch.int8 and sums.abs().max() <= 63
    assert (sums.flatten() * steps - table).abs().max() <= 1.001 * steps
