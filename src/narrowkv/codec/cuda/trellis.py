"""The search for trellis-coded streams on a GPU, written in Triton."""

from collections.abc import Sequence

import torch
from torch import Tensor

from narrowkv.codec.scheme_parts import stream_bytes

MOST_HISTORY = 2**26  # bytes of predecessors at a time
HISTORY = 128  # of an element


def search(elements: Tensor, weights: Tensor, counts: Sequence[int], entries: Tensor) -> Tensor:
    """`trellis.encode_naive` by a kernel, bit for bit. Needs Triton.

    elements: [heads, rows, n] int16. weights: [heads, rows or 1, n] uint16. entries: [6, 256] int32, in the unit of elements.
    """
    from narrowkv.codec.cuda.kernels.trellis import search_streams

    heads, rows, n = elements.shape
    codes = torch.empty(heads, rows, stream_bytes(counts), dtype=torch.uint8, device=elements.device)
    if not codes.numel():
        return codes
    most = max(min(rows, MOST_HISTORY // (heads * n * HISTORY)), 1)  # rows at a time
    history = torch.empty(heads * most * n * HISTORY, dtype=torch.uint8, device=elements.device)
    elements, weights, entries = elements.contiguous(), weights.contiguous(), entries.contiguous()
    with torch.cuda.device_of(elements):
        for first in range(0, rows, most):
            search_streams[(min(most, rows - first), heads)](
                elements, weights, entries, codes, history, rows, first,
                COUNTS=tuple(counts[1:]), N=n, BYTES=codes.shape[2], BY_ROW=weights.shape[1] > 1, num_warps=1,
            )  # fmt: skip
    return codes
