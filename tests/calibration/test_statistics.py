import pytest
import torch

from narrowkv.calibration.statistics import CODEBOOK_BINS, CodebookHistogram, Quantiles


def test_streamed_quantiles_equal_those_of_all_elements():
    x = torch.randn(6000, 9) * torch.arange(1, 10) + torch.arange(9)
    x[5000:] *= 5  # ranges grow in both directions, several times over
    quantiles = Quantiles()
    for part in x.split(700):
        quantiles.add(part)
    width = x.amax(0) - x.amin(0)
    for fraction in (0.005, 0.05, 0.5, 0.995):
        found, bin_width = quantiles.quantile(fraction), width * 3 / 1024
        assert ((x < found - bin_width).float().mean(0) <= fraction + 1e-4).all()
        assert ((x <= found + bin_width).float().mean(0) >= fraction - 1e-4).all()
    assert torch.equal(quantiles.largest, x.amax(0))
    assert quantiles.counts.sum() == x.numel()
    pooled = quantiles.quantile(0.99, pooled=True)
    assert pooled.item() == pytest.approx(x.flatten().quantile(0.99).item(), abs=0.01 * width.max().item())


def test_frequent_extreme_elements_are_not_clipped():
    x = torch.randint(0, 100, (8000, 5)) / 10.0
    x[:800], x[800:1600] = 0.0, 9.9  # 10% each at the smallest and the largest element
    quantiles = Quantiles()
    for part in x[torch.randperm(8000)].split(1000):
        quantiles.add(part)
    lower, upper = quantiles.quantile(0.005), quantiles.quantile(0.995)
    assert not ((x < lower) | (x > upper)).any()
    lower, upper = quantiles.quantile(0.005, pooled=True), quantiles.quantile(0.995, pooled=True)
    assert not ((x < lower) | (x > upper)).any()


def test_memory_does_not_grow_with_samples():
    quantiles = Quantiles()
    quantiles.add(torch.randn(100, 5))
    size = quantiles.counts.numel()
    for _ in range(20):
        quantiles.add(torch.randn(500, 5))
    assert quantiles.counts.numel() == size


def test_quantiles_of_a_constant_channel_are_its_value():
    quantiles = Quantiles()
    quantiles.add(torch.full((50, 2), 3.0))
    assert quantiles.quantile(0.005).tolist() == [3.0, 3.0]
    assert quantiles.quantile(0.5, pooled=True).tolist() == [3.0]
    assert quantiles.quantile(0.995).tolist() == [3.0, 3.0]


def test_histogram_stores_weights_and_skips_elements_outside():
    x = torch.cat([torch.rand(5000) * 2 - 1, torch.tensor([1.5, -1.01, 40.0])])
    weight = torch.rand(len(x))
    histogram = CodebookHistogram()
    for part, mass in zip(x.split(999), weight.split(999), strict=True):
        histogram.add(part, mass)
    assert histogram.count.sum() == 5000
    assert histogram.weight.sum().item() == pytest.approx(weight[:5000].sum().item(), rel=1e-5)
    mean = (histogram.weight * histogram.centers).sum() / histogram.weight.sum()
    exact = (weight[:5000] * x[:5000]).sum() / weight[:5000].sum()
    assert mean.item() == pytest.approx(exact.item(), abs=1 / CODEBOOK_BINS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_counts_do_not_depend_on_the_order_and_stay_with_their_channel(dtype):
    x = torch.stack([torch.full((3000,), 0.3), torch.randn(3000) * 1e-3 + 7, torch.randn(3000) * 30, torch.zeros(3000)], 1).to(
        dtype
    )
    x[-1, 3] = 0.01
    found = []
    for order in (range(6), (5, 2, 0, 4, 1, 3)):
        quantiles = Quantiles()
        for i in order:
            quantiles.add(x[500 * i : 500 * (i + 1)])
        assert quantiles.counts.sum(1).tolist() == [3000] * 4
        found.append(quantiles)
    for name in ("counts", "exponent", "first", "smallest", "largest"):
        assert torch.equal(*(getattr(one, name) for one in found))
