"""Samples: the same whatever the order, uniform, and a cost that is the second-order one."""

from dataclasses import replace

import pytest
import torch

from narrowkv.calibration import samples as module
from narrowkv.calibration.samples import Samples
from narrowkv.codec import Quantization, Quantizer, Scheme, quantizer_for
from narrowkv.errors import ActivationError
from narrowkv.methods import get_recipe


def test_a_sample_does_not_depend_on_the_order_and_is_uniform(monkeypatch):
    monkeypatch.setattr(module, "CAPACITY", 100)
    x = torch.randn(20, 50, 2, 8)
    x[:, :, 0, 0] = torch.arange(1000).view(20, 50) / 10
    gradient = torch.randn_like(x)
    one, other = Samples(), Samples()
    for row in range(20):
        one.add(x[row], gradient[row])
        other.add(x[19 - row], gradient[19 - row])
    assert torch.equal(one.elements, other.elements) and len(one.elements) == 100 and one.tokens == 1000
    torch.testing.assert_close(one.moment, other.moment, rtol=1e-5, atol=1e-4)
    positions = one.elements[:, 0, 0].float()
    assert 40 < positions.mean() < 60 and positions.min() < 10 and positions.max() > 90


def test_fisher_and_cost_follow_their_formulas():
    x, gradient = torch.randn(500, 2, 8), torch.randn(500, 2, 8) * torch.rand(8) * 3
    samples = Samples()
    samples.add(x, gradient)
    expected = torch.einsum("nhd,nhe->hde", gradient, gradient).double() / 500
    torch.testing.assert_close(samples.fisher(), expected, rtol=1e-4, atol=0.02)
    quantizer = Quantizer(Scheme(Quantization(2, "int")))
    assert samples.heads().shape[2] == 400
    stored = samples.heads(unseen=True)
    missed = (stored - quantizer.dequantize(quantizer.encode(stored)))[0].double()
    by_hand = sum(float(missed[h, n] @ samples.fisher()[h] @ missed[h, n]) / 2 for h in range(2) for n in range(100)) / 100
    assert samples.cost(quantizer) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("tokens", [500, 40])
def test_groups_of_tokens_cost_what_whole_ones_do(tokens):
    """100 unseen tokens fill three groups of 32, and 8 fill none."""
    samples = Samples()
    samples.add(torch.randn(tokens, 2, 8), None)
    scheme = get_recipe("intrinsic-2-nearest").keys
    quantizer = quantizer_for(replace(scheme, quantization=replace(scheme.quantization, group_size=32)))
    stored = samples.heads(unseen=True)
    stored = stored[:, :, :96] if tokens == 500 else stored.repeat(1, 1, 4, 1)
    missed = (stored - quantizer.dequantize(quantizer.encode(stored)))[0]
    assert samples.cost(quantizer) == pytest.approx(float(missed.square().sum((0, 2)).mean()) / 2, rel=1e-5)


def test_without_gradient_all_errors_weigh_alike():
    samples = Samples()
    samples.add(torch.randn(50, 1, 4), None)
    assert torch.equal(samples.fisher()[0], torch.eye(4).double())


def test_numbers_out_of_range_are_refused():
    for bad in (torch.full((1, 1, 4), torch.nan), torch.full((1, 1, 4), 1e6)):
        with pytest.raises(ActivationError):
            Samples().add(bad, None)


def test_repeated_vectors_are_all_sampled(monkeypatch):
    """In the first layer, elements before the rotary embedding are those of the word."""
    monkeypatch.setattr(module, "CAPACITY", 400)
    words = torch.randn(40, 1, 4)
    samples = Samples()
    for _ in range(50):
        samples.add(words[torch.randperm(40)], None)
    counts = (samples.elements.float()[:, None] - words.half().float()).abs().amax((2, 3)).eq(0).sum(0)
    assert counts.min() >= 1 and counts.max() < 30
