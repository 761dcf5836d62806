"""Where ranges end: the ratio with the least error, tried one by one."""

import pytest
import torch
from transformers import DynamicCache

from narrowkv.exports import StaticQuantization, fitted_ranges, observe_ranges
from narrowkv.exports.clipping import RATIOS
from narrowkv.integrations.preparation import model_info_for


@pytest.mark.parametrize(("strategy", "shared"), [("tensor", (0, 1)), ("head", 1), ("channel", ())])
def test_values_end_where_their_error_is_least(tiny, strategy, shared):
    model, quantization = tiny(), StaticQuantization("int4", strategy)
    info, ids = model_info_for(model, "auto", []), torch.randint(2, 97, (1, 63))
    ranges = observe_ranges(model, info, [ids])
    fitted = fitted_ranges(model, info, quantization, ranges, [ids])
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    for one, best, layer in zip(ranges, fitted, cache.layers, strict=True):
        errors = []
        for ratio in RATIOS:
            error = quantization.rounded(layer.values, quantization.scales(one.values * ratio)) - layer.values
            errors.append(error.var(2, correction=0)[0])
        errors = torch.stack([error.sum(shared, keepdim=True) if shared != () else error for error in errors])
        assert torch.allclose(best.values, one.values * torch.tensor(RATIOS)[errors.argmin(0)])
        assert (best.keys <= one.keys).all() and (best.keys >= one.keys * min(RATIOS) * (1 - 1e-6)).all()
    assert any((best.values < one.values).any() for best, one in zip(fitted, ranges, strict=True))


def test_ranges_of_8_bits_stay_as_they_are(tiny):
    model = tiny()
    info, ids = model_info_for(model, "auto", []), torch.randint(2, 97, (1, 20))
    ranges = observe_ranges(model, info, [ids])
    assert fitted_ranges(model, info, StaticQuantization("fp8", "tensor"), ranges, [ids]) == ranges
