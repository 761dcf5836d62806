"""Pack small integers into bytes, as planes of 1, 2, 4 or 8 bits.

A width is a sum of planes: 3 bits are a plane of 2 and a plane of 1, so no code straddles a byte. Within a row of n codes,
code i lies in byte `i % (n / per_byte)`, at bit `plane * (i // (n / per_byte))`: neighboring codes lie in neighboring bytes
at the same shift, so a SIMD register of bytes yields neighboring codes with one shift and one mask.
"""

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.codec.memory import address

FEW = 2**17  # codes that are not worth a second thread
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def plane_bytes(count: int, plane: int) -> int:
    """Bytes that a row of `count` codes takes in a plane of `plane` bits; `count` must be a multiple of 8 / plane."""
    return count * plane // 8


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """Pack the last dimension of codes.

    codes: [..., n] uint8, each below 2**bits, n a multiple of 8. Returns one tensor per plane, lowest bits first:
    [..., n * plane / 8] uint8. Compiled for the CPU, `pack_naive` elsewhere.
    """
    if not codes.is_cpu or codes.dtype != torch.uint8:
        return pack_naive(codes, bits)
    matrices = codes.flatten(0, -3) if codes.dim() > 2 else codes.reshape(1, -1, codes.shape[-1])
    if 1 not in matrices.stride()[1:]:
        matrices = matrices.contiguous()
    threads = 1 if codes.numel() < FEW else torch.get_num_threads()
    planes, shift = [], 0
    for plane in PLANES[bits]:
        packed = torch.empty(*codes.shape[:-1], plane_bytes(codes.shape[-1], plane), dtype=torch.uint8, device="cpu")
        target = address(packed, torch.uint8)
        _kernels.pack(matrices.data_ptr(), matrices.shape, matrices.stride(), plane, shift, target, threads)
        planes.append(packed)
        shift += plane
    return planes


def pack_naive(codes: Tensor, bits: int) -> list[Tensor]:
    """The same in plain torch."""
    planes, shift = [], 0
    for plane in PLANES[bits]:
        part = ((codes >> shift) & (2**plane - 1)).unflatten(-1, (8 // plane, -1))
        rows = part.movedim(-2, 0).contiguous()  # [per_byte, ..., bytes]
        packed = rows[0]
        for i in range(1, 8 // plane):
            packed |= rows[i] << (plane * i)
        planes.append(packed.clone())  # not a view of all rows
        shift += plane
    return planes


def unpack(planes: list[Tensor], bits: int) -> Tensor:
    """Inverse of `pack`. planes: [..., n * plane / 8] uint8 each. Returns codes [..., n] uint8."""
    codes, shift = None, 0
    for plane, packed in zip(PLANES[bits], planes, strict=True):
        parts = [(packed >> (plane * i)) & (2**plane - 1) for i in range(8 // plane)]
        part = torch.cat(parts, dim=-1) << shift
        codes = part if codes is None else codes | part
        shift += plane
    assert codes is not None
    return codes
