"""Buffers that move: what a compiled encoder writes goes where their memory is now, and nowhere else."""

import copy
import pickle

import pytest
import torch
from tests.codec.test_cpu_encode_streams import drawn

from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme
from narrowkv.codec.encode_buffer import EncodeBuffer

SHAPE, FIRST = (2, 3, 6, 80), 5
WAYS = {
    "copied": lambda buffer: copy.deepcopy(buffer),
    "pickled": lambda buffer: pickle.loads(pickle.dumps(buffer)),
    "grown": lambda buffer: buffer.reserve(10_000) or buffer,
    "reordered": lambda buffer: buffer.select(torch.tensor([1, 1, 0])) or buffer,
}


def scalar_or_streams(name):
    """A quantizer, with ranges or without, and elements with outliers."""
    if name == "streams":
        return drawn(SHAPE, 0.02, learned_rotation=False)
    return Quantizer(Scheme(Quantization(3, "nf"), outliers=Outliers(0.02))), torch.randn(SHAPE)


def written(quantizer, *pieces):
    """A buffer that was given these, one after the other."""
    buffer, first = EncodeBuffer(quantizer.scheme, *pieces[0].shape[:2], 64, SHAPE[3], like=pieces[0]), 0
    for piece in pieces:
        buffer.outliers = quantizer.encode_into(buffer, first, piece)
        first += piece.shape[2]
    return buffer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["scalar", "streams"])
def test_an_encoder_writes_where_a_buffer_lies_now(name, way):
    quantizer, x = scalar_or_streams(name)
    buffer = written(quantizer, x[:, :, :FIRST])
    assert buffer.outliers > 0
    held = buffer.tensors()  # alive, so that nothing else comes to lie there
    before = [part.clone() for part in held]
    moved = WAYS[way](buffer)
    rows = x[[1, 1, 0]] if way == "reordered" else x
    moved.outliers = quantizer.encode_into(moved, FIRST, rows[:, :, FIRST:])
    expected = written(quantizer, rows[:, :, :FIRST], rows[:, :, FIRST:])
    for ours, theirs in zip(moved.encoded().first(6).tensors(), expected.encoded().first(6).tensors(), strict=True):
        assert torch.equal(ours, theirs)
    kept = {part.data_ptr() for part in moved.tensors()}  # a buffer that has grown keeps its codes where they were
    for part, old in zip(held, before, strict=True):
        assert part.data_ptr() in kept or torch.equal(part, old)
