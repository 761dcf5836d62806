import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowkv.calibration.kmeans import optimal_codebook


def loss(points, weights, codebook):
    return (weights * ((points[:, None] - codebook) ** 2).min(1)).sum()


def brute_force(points, weights, levels):
    best = np.inf
    for cuts in itertools.combinations(range(1, len(points)), levels - 1):
        total = 0.0
        for first, last in itertools.pairwise([0, *cuts, len(points)]):
            p, w = points[first:last], weights[first:last]
            total += (w * (p - (w * p).sum() / w.sum()) ** 2).sum()
        best = min(best, total)
    return best


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 1, width=32), st.floats(0.0078125, 10, width=32)), min_size=1, max_size=11),
    st.integers(1, 5),
)
def test_the_optimum_is_exact(samples, levels):
    points, weights = (np.array(part, dtype=np.float64) for part in zip(*sorted(samples), strict=True))
    codebook = optimal_codebook(points, weights, levels)
    assert len(codebook) == levels
    assert (np.diff(codebook) >= 0).all()
    expected = 0.0 if len(points) <= levels else brute_force(points, weights, levels)
    assert loss(points, weights, codebook) == pytest.approx(expected, abs=1e-9)


def test_better_than_lloyd_on_a_fine_histogram():
    points = np.linspace(-1, 1, 4096)
    weights = np.exp(-8 * points**2) + 0.1 * np.exp(-500 * (points - 0.7) ** 2)
    for levels in (4, 8, 16):
        lloyd = np.linspace(-0.9, 0.9, levels)
        for _ in range(300):
            labels = np.searchsorted((lloyd[1:] + lloyd[:-1]) / 2, points)
            lloyd = np.bincount(labels, weights * points, levels) / np.bincount(labels, weights, levels)
        assert loss(points, weights, optimal_codebook(points, weights, levels)) <= loss(points, weights, lloyd) + 1e-9


def test_weights_of_very_different_magnitudes():
    rng = np.random.default_rng(0)
    points, weights = np.sort(rng.normal(size=2000)), np.exp(rng.normal(size=2000) * 20)
    codebook = optimal_codebook(points, weights, 8)
    heaviest = np.sort(points[np.argsort(weights)[-8:]])
    assert loss(points, weights, codebook) <= loss(points, weights, heaviest)


def test_vectors_without_weight_do_not_count():
    points, weights = np.array([-1.0, 0.0, 0.5, 1.0]), np.array([0.0, 1.0, 1.0, 0.0])
    assert optimal_codebook(points, weights, 2).tolist() == [0.0, 0.5]
    assert optimal_codebook(points, np.zeros(4), 4).tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])
