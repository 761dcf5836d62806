import pytest
import torch

from narrowkv.codec.packing import PLANES, pack, pack_naive, plane_bytes, unpack


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("shape", [(8,), (3, 64), (1, 2, 80), (0, 16)], ids=str)
def test_unpack_inverts_pack(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    planes = pack(codes, bits)
    assert torch.equal(unpack(planes, bits), codes)
    assert sum(plane.shape[-1] for plane in planes) * 8 == bits * shape[-1]
    assert [plane.shape[-1] for plane in planes] == [plane_bytes(shape[-1], plane) for plane in PLANES[bits]]


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 2, 64, 80), (2, 5, 64, 128)], ids=str)
def test_the_compiled_form_is_the_plain_one(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    for view in (codes, codes.transpose(2, 3), codes.transpose(0, 1), codes.repeat(1, 1, 1, 2)[..., ::2]):
        for ours, theirs in zip(pack(view, bits), pack_naive(view, bits), strict=True):
            assert torch.equal(ours, theirs)


def test_layout_is_as_documented():
    codes = torch.arange(16, dtype=torch.uint8)  # 4 bits: byte b holds codes b and b + 8
    (plane,) = pack(codes, 4)
    assert plane.tolist() == [b | (b + 8) << 4 for b in range(8)]
    low, high = pack(codes % 8, 3)  # a plane of the two low bits, a plane of the high bit
    assert low.tolist() == [sum(((b + 4 * i) % 8 & 3) << 2 * i for i in range(4)) for b in range(4)]
    assert high.tolist() == [sum(((b + 2 * i) % 8 >> 2) << i for i in range(8)) for b in range(2)]
