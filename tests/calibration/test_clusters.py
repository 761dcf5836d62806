"""Growing codebooks against the exact optimum in one dimension, and against what no codebook can beat in two."""

import pytest
import torch

from narrowkv.calibration.clusters import Books
from narrowkv.calibration.kmeans import optimal_codebook
from narrowkv.codec.points import to_vectors


def cost(numbers, points):
    """Mean squared distance to the nearest point: [heads, codes]."""
    vectors = to_vectors(numbers, points.shape[3])  # [heads, samples, codes, count]
    return (vectors[..., None, :] - points[:, None]).square().sum(-1).amin(-1).mean(1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_close_to_the_optimum_in_one_dimension(bits):
    numbers = torch.cat([torch.randn(2, 1500, 3), torch.randn(2, 1500, 3) * 3 + 100], dim=1)
    numbers[0] = torch.distributions.StudentT(3.0).sample((3000, 3))
    found = Books(numbers, 1).points(bits)
    least = torch.empty(2, 3)
    for head in range(2):
        for channel in range(3):
            one = numbers[head, :, channel]
            best = optimal_codebook(one.double().sort().values.numpy(), torch.ones(3000).numpy(), 2**bits)
            least[head, channel] = cost(one[None, :, None], torch.from_numpy(best).float()[None, None, :, None])
    ratio = cost(numbers, found) / least
    assert ratio.mean() < 1.25 and ratio.max() < 1.7
    assert (found.diff(dim=2) >= 0).all()


def test_a_pair_beats_two_codebooks_where_its_numbers_go_together():
    first = torch.randn(2, 4000, 5)
    numbers = torch.cat([first, first + 0.2 * torch.randn(2, 4000, 5)], dim=2)
    both, apart = cost(numbers, Books(numbers, 2).points(4)), cost(numbers, Books(numbers, 1).points(2))
    assert (both < 0.5 * (apart[:, :5] + apart[:, 5:])).all()


def test_every_point_is_used_and_sizes_share_their_growth():
    numbers = torch.randn(2, 3000, 8) * torch.tensor([5.0] * 4 + [0.1] * 4) + 1000
    books = Books(numbers, 2)
    small, large = books.points(3), books.points(6)
    assert torch.equal(small, books.points(3)) and large.shape == (2, 4, 64, 2)
    assert all(len(points.unique(dim=0)) == 64 for points in large.flatten(0, 1))
    assert (cost(numbers, large) < 0.2 * cost(numbers, small)).all()


def test_fewer_samples_than_points_and_constants_do_no_harm():
    few = torch.randn(1, 5, 2)
    assert cost(few, Books(few, 2).points(4)).max() < 1e-9
    assert torch.isfinite(Books(torch.ones(2, 50, 2), 1).points(3)).all()
