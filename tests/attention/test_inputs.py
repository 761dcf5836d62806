"""What every backend derives from the inputs of attention, against the same written out token by token."""

from dataclasses import replace

import pytest
import torch
from tests.cases import frequencies

from narrowkv.attention import AttentionInputs, AttentionMask, Rope


def inputs_of(dtype=torch.float32, new=3):
    """5 queries behind 7 or more tokens, of which the first two were forgotten."""
    keys = torch.randn(2, 1, new, 16, dtype=dtype)
    return AttentionInputs(
        query=torch.randn(2, 4, 5, 16, dtype=dtype),
        past=9,
        new=(keys, keys) if new else None,
        rope=Rope(frequencies(8)),
        rope_state=torch.randint(1000, (1, 7)).expand(2, -1),
        mask=AttentionMask(sliding_window=4),
        scaling=0.25,
    )


@pytest.mark.parametrize("new", [0, 3])
def test_queries_are_the_last_tokens_and_see_those_of_their_window(new):
    inputs = inputs_of(new=new)
    assert inputs.queries == 5 and inputs.length == 9 + new
    assert list(inputs.query_positions) == [4 + new, 5 + new, 6 + new, 7 + new, 8 + new]
    hidden = inputs.hidden(2)
    assert hidden.shape == (1, 1, 5, 7 + new)
    for i, query in enumerate(inputs.query_positions):
        assert [2 + j for j in range(7 + new) if not hidden[0, 0, i, j]] == list(range(max(query - 3, 2), query + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_stored_keys_are_rotated_by_their_own_angles_in_32_bits_or_more(dtype):
    inputs, keys = inputs_of(dtype), torch.randn(2, 1, 3, 16).to(dtype)
    expected = inputs.rope.rotate(keys.to(inputs.precision), inputs.rope_state[:, 4:7])
    assert inputs.precision == (torch.float64 if dtype == torch.float64 else torch.float32) == expected.dtype
    assert torch.equal(inputs.rotate(keys, 4), expected)
    assert inputs.with_query(inputs.query.double()).rotate(keys, 4).dtype == torch.float64
    for still in (replace(inputs, rope=None), replace(inputs, rope_state=None)):
        assert still.rotate(keys, 4) is keys


def test_rope_state_per_sequence_and_token():
    inputs = replace(inputs_of(), rope_state=torch.arange(28).view(2, 7, 2))
    tokens = torch.tensor([[0, 6, 3], [5, 5, -1]])
    expected = [[[0, 1], [12, 13], [6, 7]], [[24, 25], [24, 25], [26, 27]]]
    assert inputs.rope_state_at(tokens).tolist() == expected
    shared = replace(inputs, rope_state=inputs.rope_state[:1])
    assert shared.rope_state_at(tokens)[1].tolist() == [[10, 11], [10, 11], [12, 13]]
