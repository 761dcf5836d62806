"""What queries see, given in short, against what is given of each query and key."""

import itertools

import pytest
import torch

from narrowkv.attention import AttentionMask

PADDING = torch.tensor([[False, True, True, True, True, True, False, True]])


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("window", [None, 3])
def test_mask_patterns_and_the_tokens_they_exclude(padding, window):
    mask, found = AttentionMask(padding, window), set()
    ranges = [range(start, stop) for start, stop in itertools.combinations(range(9), 2)]
    for queries, keys in itertools.product(ranges, ranges):
        near = mask.within(keys, queries)
        for key in set(keys) - set(near):
            assert mask.hidden(torch.tensor(queries), torch.tensor([key])).all()
        if not near:
            continue
        hidden = mask.hidden(torch.tensor(queries), torch.tensor(near))
        pattern = mask.pattern(queries, near)
        found.add(pattern)
        if pattern == "all":
            assert not hidden.any()
        elif pattern == "causal":
            assert torch.equal(~hidden[0, 0], torch.ones(len(queries), len(near), dtype=torch.bool).tril())
        else:
            assert hidden.any() or hidden.shape[2] == 1
    assert found == {"all", "causal", None}


def test_a_mask_rule_has_no_fixed_pattern():
    assert AttentionMask(rule=lambda b, h, q, k: k <= q).pattern(range(5, 6), range(5)) is None
