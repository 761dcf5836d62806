"""Triton: requesting a block before its turn, where the compiler does not read ahead by itself."""

import triton
import triton.language as tl

from narrowkv.attention.cuda.kernels.unpack import INTERPRETED


@triton.jit
def addresses_of(entry):
    """Where the planes of a side of a block, its outliers, their index and offsets lie: int64 each."""
    planes = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    return planes, tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)


@triton.jit
def outlier_range(address, head):
    """Where the outliers of a head of a block begin and end."""
    offsets = address.to(tl.pointer_type(tl.int32)) + head
    return tl.load(offsets), tl.load(offsets + 1)


@triton.jit
def fetch(addresses, begin, end, head, F: tl.constexpr):
    """Have the second cache fetch the codes and outliers of a head of a block, of which each warp prefetches a part."""
    planes, values, index, _ = addresses
    for i in tl.static_range(0 if F.bits == 16 else len(F.planes)):
        fetch_plane(planes[i], head, F.rows * F.row_bytes[i])
    if F.nonzeros > 0:
        which = begin + tl.minimum(tl.arange(0, F.nonzeros), tl.maximum(end - begin - 1, 0))
        some = end > begin  # else there may be no such memory
        fetch_lines(tl.where(some, index + which * 2, planes[0]))
        fetch_lines(tl.where(some, values + which * (4 if F.kind == "fp32" else 2), planes[0]))


@triton.jit
def fetch_plane(address, head, SIZE: tl.constexpr):
    """The same of a head's part of a plane."""
    fetch_lines(address + head * SIZE + tl.minimum(tl.arange(0, 128) * ((SIZE + 127) // 128), SIZE - 1))


@triton.jit
def fetch_lines(addresses):
    """The same of what lies at addresses [128] int64."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
        )
