"""Codebooks of channels and pairs as calibration makes them."""

import itertools

import pytest
import torch

from narrowkv.calibration.point_fit import PointFit, rotation
from narrowkv.codec import Scheme
from narrowkv.methods import get_recipe

SHAPE = (2, 16)


@pytest.fixture
def fit():
    mixing = torch.randn(16, 16) * torch.logspace(0, -1.5, 16)
    x = torch.randn(3000, 2, 16) @ mixing + torch.randn(2, 16)
    found = PointFit()
    found.see_range(x)
    found.see_codebook(x, torch.randn_like(x))
    return found


@pytest.mark.parametrize("name", ["pair2", "pair3-1%", "channel2", "channel4-2%"])
def test_quantizers_of_all_schemes_come_from_one_sample(fit, name):
    recipe = get_recipe(name)
    for scheme in (recipe.keys, recipe.values):
        quantizer = fit.quantizer(SHAPE, scheme)
        numbers = fit.samples.heads()
        encoded = quantizer.encode(numbers)
        if scheme.outliers:
            assert len(encoded.outlier_values) / encoded.codes.numel() == pytest.approx(scheme.outliers, rel=0.02)
        error = (numbers - quantizer.decode(encoded)).square().mean() / numbers.var()
        assert error < {2: 0.2, 3: 0.05, 4: 0.02}[scheme.bits]


def test_more_bits_and_turning_cost_less(fit):
    def cost(**settings):
        scheme = Scheme(datatype="nuq", axis="channel", codebook="pair", **settings)
        return fit.samples.cost(fit.quantizer(SHAPE, scheme))

    costs = [cost(bits=bits) for bits in (1.5, 2, 2.5, 3, 3.5, 4)]
    assert all(less < 0.75 * more for more, less in itertools.pairwise(costs))
    assert cost(bits=2, turn=True) < 0.6 * cost(bits=2)


def test_a_rotation_is_orthogonal_and_takes_correlations_out(fit):
    numbers = fit.samples.heads()[0].double()
    turn = rotation(numbers, fit.samples.fisher(weighted=False))
    torch.testing.assert_close(turn.mT @ turn, torch.eye(16).double().expand(2, -1, -1))
    covariance = torch.stack([torch.cov((head @ axes).mT) for head, axes in zip(numbers, turn, strict=True)])
    variance = covariance.diagonal(dim1=1, dim2=2)
    assert (covariance - torch.diag_embed(variance)).abs().max() < 1e-6 * variance.max()
    assert (variance[:, :8].diff() <= 0).all() and (variance[:, 8:].diff() >= 0).all()  # largest beside smallest


def test_weights_decide_where_the_points_go():
    x = torch.randn(2000, 1, 2)
    gradient = torch.tensor([10.0, 0.1]) * torch.randn_like(x)
    found = PointFit()
    found.see_codebook(x, gradient)
    quantizer = found.quantizer((1, 2), Scheme(2, "nuq", axis="channel", codebook="pair"))
    numbers = found.samples.heads()
    missed = (numbers - quantizer.decode(quantizer.encode(numbers))).square().mean((0, 1, 2))
    assert missed[0] < 0.05 * missed[1]
