"""The cost of each part alone: all of it together is about their sum, and nothing where nothing is quantized."""

import pytest
import torch

from narrowkv import calibrate
from narrowkv.evaluate import measure
from narrowkv.evaluate.sensitivity import part_losses


def test_parts_add_up(tiny):
    model, ids = tiny(), torch.randint(2, 97, (3, 120))
    calibration = calibrate(model, ids, "narrow4.5")
    windows = torch.randint(2, 97, (2, 120))
    seen = []
    losses = part_losses(model, calibration, windows, on_step=lambda done, total: seen.append((done, total)))
    assert set(losses) == {(layer, side) for layer in calibration.layers for side in ("keys", "values")}
    assert all(loss > 0 for loss in losses.values()) and seen[-1] == (2 * len(losses),) * 2
    whole = measure(model, [calibration], windows)[0].kld_strict
    assert sum(losses.values()) == pytest.approx(whole, rel=0.5)
