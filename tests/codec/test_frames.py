"""Frames of 16 tokens: one rotated query meets all keys of a frame."""

import pytest
import torch

from narrowkv.attention.rope import Rope
from narrowkv.codec.frames import FRAME, Frames
from narrowkv.codec.pairs import times


def frequencies(pairs):
    return 10000.0 ** -(torch.arange(pairs) / pairs)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [0, 5, 8])
def test_keys_rotated_to_the_middle_of_a_frame_score_with_one_query(interleaved, pairs):
    rope = Rope(frequencies(pairs), interleaved=interleaved)
    frames = Frames.of(16, rope.inverse_frequencies, interleaved)
    keys, query = torch.randn(1, 2, 40, 16).double(), torch.randn(16).double()
    first, start = 21, 1003  # place in the block, and position, of the first token
    rotated = frames.rotate(keys, first)
    for i in range(40):
        range_zero = torch.tensor([[start + i - (first + i) % FRAME + 8]])
        seen = rope.rotate_precisely(query.expand(1, 1, 1, -1), -range_zero)[
            0, 0, 0
        ]  # rotated back, instead of the keys forwards
        position = torch.tensor([[start + i]])
        expected = rope.rotate_precisely(keys[:, :, i : i + 1], position)[:, :, 0] @ query
        torch.testing.assert_close(rotated[:, :, i] @ seen[frames.channels.long()], expected)


def undone(frames, x):
    """Channels of whole blocks from what `rotate` made of them."""
    back = frames.back().to(x.dtype).repeat(x.shape[-2] // 16, 1, 1, 1)
    return frames.in_order(times(x, back))


@pytest.mark.parametrize("interleaved", [False, True])
def test_unrotating_inverts_rotating(interleaved):
    frames, x = Frames.of(24, frequencies(7), interleaved), torch.randn(2, 3, 64, 24).double()
    torch.testing.assert_close(undone(frames, frames.rotate(x, 0)), x)
    assert not torch.equal(frames.rotate(x, 0), x[..., frames.channels.long()])


def test_without_a_rotary_embedding_nothing_rotates():
    frames, x = Frames.of(16), torch.randn(1, 1, 64, 16)
    assert torch.equal(frames.rotate(x, 0), x) and torch.equal(undone(frames, x), x)


def test_a_rotated_moment_is_the_mean_over_a_frame():
    frames, x = Frames.of(16, frequencies(6), True), torch.randn(2, 50, 16).double()
    every = torch.stack([frames.rotate(x[:, i : i + 1].expand(-1, FRAME, -1), 0) for i in range(50)], 1).flatten(1, 2)
    expected = every.mT @ every / FRAME
    torch.testing.assert_close(frames.rotate_moment(x.mT @ x), expected)
