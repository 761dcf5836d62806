"""Growing codebooks against the exact optimum in one dimension, and against what no codebook can beat in two."""

import pytest
import torch

from narrowkv.calibration.clusters import Books
from narrowkv.calibration.kmeans import optimal_codebook


def cost(vectors, points):
    return (vectors[:, :, None] - points[:, None]).square().sum(-1).amin(-1).mean(1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_close_to_the_optimum_in_one_dimension(bits):
    vectors = torch.cat([torch.randn(3, 1500, 1), torch.randn(3, 1500, 1) * 3 + 100], dim=1)
    vectors[0] = torch.distributions.StudentT(3.0).sample((3000, 1))
    found = Books(vectors).points(bits)
    for numbers, points in zip(vectors, found, strict=True):
        ordered = numbers.flatten().double().sort().values
        best = torch.from_numpy(optimal_codebook(ordered.numpy(), torch.ones(3000).numpy(), 2**bits)).float()
        assert cost(numbers[None], points[None]) <= 1.15 * cost(numbers[None], best[None, :, None])
        assert (points.flatten().diff() >= 0).all()


def test_a_pair_beats_two_codebooks_where_its_numbers_go_together():
    first = torch.randn(2, 4000, 1)
    vectors = torch.cat([first, first + 0.2 * torch.randn(2, 4000, 1)], dim=2)
    both = cost(vectors, Books(vectors).points(4))
    apart = sum(cost(part, Books(part).points(2)) for part in vectors.split(1, dim=2))
    assert (both < 0.5 * apart).all()


def test_every_point_is_used_and_sizes_share_their_growth():
    books = Books(torch.randn(4, 3000, 2) * torch.tensor([5.0, 0.1]) + 1000)
    small, large = books.points(3), books.points(6)
    assert torch.equal(small, books.points(3)) and large.shape == (4, 64, 2)
    for problem, points in zip(torch.arange(4), large, strict=True):
        del problem
        assert len(points.unique(dim=0)) == 64
    assert (cost(books._vectors + books._center, large) < 0.2 * cost(books._vectors + books._center, small)).all()


def test_fewer_samples_than_points_and_constants_do_no_harm():
    few = torch.randn(1, 5, 2)
    assert cost(few, Books(few).points(4)).max() < 1e-9
    assert torch.isfinite(Books(torch.ones(2, 50, 2)).points(3)).all()
