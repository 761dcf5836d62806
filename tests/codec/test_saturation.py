"""Counts of what lies far out of range."""

import torch

from narrowkv.codec.saturation import Saturation


def test_nothing_is_out_of_range_before_anything_was_seen():
    assert Saturation().fraction == 0


def test_tokens_that_are_skipped_are_seen_and_never_out_of_range():
    saturation = Saturation()
    saturation.count(3, 100)
    out_of_range = torch.zeros(2, 3, 4, 5, dtype=torch.bool)
    out_of_range[1, :, 2:] = True
    saturation.observe(out_of_range, None)
    assert vars(saturation) == {"out_of_range": 33, "seen": 220}
    saturation.observe(out_of_range, torch.tensor([[False] * 4, [False, False, False, True]]))
    assert vars(saturation) == {"out_of_range": 48, "seen": 340} and saturation.fraction == 48 / 340
