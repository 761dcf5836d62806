"""Packing on a GPU, interpreted, against plain torch."""

import pytest
import torch
from tests.conftest import KERNEL_DEVICE

from narrowkv.codec.cuda import encode as cuda
from narrowkv.codec.cuda.pack import pack_into
from narrowkv.codec.packing import PLANES, pack_naive

pytestmark = pytest.mark.skipif(cuda.kernels() is None, reason="needs Triton (`pip install triton`)")


@pytest.mark.parametrize("bits", PLANES)
def test_planes_are_those_of_plain_torch(bits):
    prompt = torch.randint(0, 2**bits, (1, 3, 128, 40), dtype=torch.uint8, device=KERNEL_DEVICE)
    blocks = prompt.unflatten(2, (2, 64)).permute(2, 0, 1, 3, 4).flatten(0, 1)
    assert blocks.data_ptr() == prompt.data_ptr()
    for rows in (blocks, blocks.transpose(2, 3)):
        expected = pack_naive(rows, bits)
        planes = [torch.empty_like(plane) for plane in expected]
        pack_into(planes, rows, bits)
        for ours, theirs in zip(planes, expected, strict=True):
            assert torch.equal(ours, theirs)
