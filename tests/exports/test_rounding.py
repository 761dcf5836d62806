"""What static scales lose, against plain recomputation, and the refusal of what breaks a model."""

import pytest
import torch
from transformers import DynamicCache

from narrowkv.errors import CalibrationError
from narrowkv.exports import StaticQuantization, divergence, measure_rounding, observe_ranges, require_bearable
from narrowkv.integrations.preparation import model_info_for


def batches(tokens=64, count=2):
    return [torch.randint(2, 97, (1, tokens)) for _ in range(count)]


def with_bias(model, size):
    """The model with a bias on the slowest channel of its first layer's keys, as Qwen2.5 has it."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.zero_()
            layer.self_attn.v_proj.bias.zero_()
        model.model.layers[0].self_attn.k_proj.bias[15] = size
    return model


@pytest.mark.parametrize(("datatype", "strategy"), [("int4", "channel"), ("int8", "head"), ("fp8", "tensor")])
def test_metrics_are_those_of_the_elements_stored(tiny, datatype, strategy):
    model = with_bias(tiny("qwen2"), 20.0)
    info, quantization = model_info_for(model, "auto", []), StaticQuantization(datatype, strategy)
    ranges = observe_ranges(model, info, batches())
    for one in ranges:
        one.values *= 0.5  # so that some are clipped
    (ids,) = batches(count=1)
    found = measure_rounding(model, info, quantization, ranges, [ids])
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    for i, layer in enumerate(cache.layers):
        rope, spread_out = info.attention[i].rope, torch.linspace(0, 511, 64, dtype=torch.float64).long()[None]
        keys = rope.rotate(rope.unrotate(layer.keys, torch.arange(64)[None]), spread_out).float()
        for side, stored, largest in (("keys", keys, ranges[i].keys), ("values", layer.values, ranges[i].values)):
            (one,) = (one for one in found if (one.layer, one.side) == (i, side))
            scale = quantization.scales(largest)
            error = quantization.rounded(stored, scale) - stored
            error = (error - error.mean(2, keepdim=True)).square().sum((0, 2, 3))
            bias = torch.zeros(2, 16)
            if (i, side) == (0, "keys"):
                bias[0, 15] = 20.0
            rest = stored - (rope.rotate(bias[None, :, None].expand(1, 2, 64, 16), spread_out) if side == "keys" else 0)
            spread = rest.square().sum((0, 2, 3))
            assert one.noise == pytest.approx((error / spread).max().item(), rel=1e-3)
            assert one.bias == pytest.approx((bias.norm(dim=1) / (spread / 64).sqrt()).max().item(), rel=1e-3)
            beyond = stored.abs() > scale[:, None] * quantization.limit
            assert one.clipped == pytest.approx(beyond.float().mean().item()) and one.largest == pytest.approx(
                largest.max().item()
            )
    assert any(one.clipped for one in found)


def test_divergence_is_that_of_the_rounded_elements(tiny):
    model, (ids,) = tiny(), batches(count=1)
    info, quantization = model_info_for(model, "auto", []), StaticQuantization("int4", "head")
    ranges = observe_ranges(model, info, [ids])

    class Rounded(DynamicCache):
        def update(self, keys, values, layer, *args, **kwargs):
            keys = quantization.rounded(keys, quantization.scales(ranges[layer].keys))
            values = quantization.rounded(values, quantization.scales(ranges[layer].values))
            return super().update(keys, values, layer, *args, **kwargs)

    with torch.no_grad():
        exact, rounded = (
            model(ids, past_key_values=cache).logits[0, :-1].double().log_softmax(-1) for cache in (DynamicCache(), Rounded())
        )
    expected = (exact.exp() * (exact - rounded)).sum(-1).mean().item()
    assert divergence(model, info, quantization, ranges, [ids]) == pytest.approx(expected, rel=1e-4) and expected > 0


def measured(model, datatype, strategy):
    info, quantization = model_info_for(model, "auto", []), StaticQuantization(datatype, strategy)
    ranges = observe_ranges(model, info, batches())
    unseen = batches()
    found = measure_rounding(model, info, quantization, ranges, unseen)
    return quantization, found, divergence(model, info, quantization, ranges, unseen)


def test_int4_on_biased_keys_is_refused_by_its_cause(tiny):
    model = with_bias(tiny("qwen2", initializer_range=0.2), 100.0)
    with pytest.raises(CalibrationError, match=r"in layer 0 a bias \d+ times as large as the rest of a key sets the scale"):
        require_bearable(*measured(model, "int4", "tensor"))
    require_bearable(*measured(model, "int8", "channel"))
    require_bearable(*measured(with_bias(model, 0.0), "int4", "channel"))


def test_a_loss_without_a_bias_is_refused_by_its_cause(tiny):
    quantization, found, _ = measured(tiny(), "int4", "tensor")
    with pytest.raises(CalibrationError, match="a few large elements set the scale"):
        require_bearable(quantization, found, 1.5)
