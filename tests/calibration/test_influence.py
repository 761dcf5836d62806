"""No token weighs too much, and the share of the strongest is what counting all of them at once gives."""

import pytest
import torch

from narrowkv.calibration.influence import Influence
from narrowkv.calibration.layer_fits import LayerFits
from narrowkv.methods import get_recipe


def norms(gradient):
    return gradient.double().square().sum((1, 2)).sqrt()


def test_the_longest_gradients_are_shortened_to_the_99th_percentile_and_no_others():
    gradient = torch.randn(1000, 2, 8) * torch.rand(1000, 1, 1)
    gradient[[3, 500, 999]] *= 1000
    found = Influence().limit(gradient)
    most = norms(gradient).square().quantile(0.99).sqrt()
    torch.testing.assert_close(norms(found), norms(gradient).clamp(max=most), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(found.flatten(1), gradient.flatten(1)), torch.ones(1000))
    kept = norms(gradient) <= most
    assert torch.equal(found[kept], gradient[kept]) and kept.sum() == 990


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_every_size_are_limited(dtype):
    for size in (0.0, 1e-4, 1.0, 3e4):
        found = Influence().limit(torch.full((50, 2, 4), size, dtype=dtype))
        assert found.dtype == torch.float32 and torch.allclose(found, torch.full_like(found, size), rtol=1e-2, atol=0)
    single = torch.zeros(300, 1, 4)
    single[7] = 1e30  # all others are nothing: there is no size to shorten it to
    assert torch.equal(Influence().limit(single), single)
    assert Influence().limit(torch.empty(0, 2, 4)).shape == (0, 2, 4)


def test_the_share_of_few_is_that_of_all_tokens_seen_in_any_order():
    gradients = [torch.randn(400, 2, 4) * torch.rand(400, 1, 1) ** 6 for _ in range(5)]
    one, other = Influence(), Influence()
    for gradient in gradients:
        one.limit(gradient)
    for gradient in reversed(gradients):
        other.limit(gradient)
    squared = torch.cat([norms(gradient).square() for gradient in gradients]).sort(descending=True).values
    assert one.share_of_few() == pytest.approx((squared[:20].sum() / squared.sum()).item(), rel=0.02)
    assert torch.equal(one.count, other.count)
    torch.testing.assert_close(one.mass, other.mass)
    assert one.count.numel() == 2048  # however many there were
    assert Influence().share_of_few() == 0


def test_one_large_gradient_does_not_determine_a_codebook():
    recipe = get_recipe("nuq2")
    x = torch.randn(1, 2, 600, 16)
    x[0, :, 5] += 3  # where the loud token lies, away from all others

    def learned(loud):
        fits = LayerFits([recipe], 0, (2, 16))
        keys, values = (x.clone().requires_grad_() for _ in range(2))
        fits.observe_range(keys, keys, values)
        fits.observe_codebook(keys, keys, values)
        weight = torch.ones(1, 1, 600, 1)
        weight[:, :, 5] = loud
        ((keys + values) * weight).sum().backward()
        return fits.quantizer(recipe.values, False, recipe.sinks).codebook, fits.dominated()

    (quiet, before), (loud, after) = learned(1.0), learned(300.0)
    assert (quiet - loud).abs().max() < 0.02
    assert before["values"] < 0.05 and after["values"] > 0.9 and after["keys"] > 0.9
