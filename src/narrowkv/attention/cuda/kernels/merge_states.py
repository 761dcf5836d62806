"""Triton: merge the softmax state of queries so far with that of one more split of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowkv.attention.cuda.kernels.layout import power_of_2

ROWS = tl.constexpr(16)  # queries of a program


@triton.jit(do_not_specialize=["rows"])
def merge_split(mean, lse, more, more_lse, rows, dim, WIDE: tl.constexpr):
    """mean: [rows, dim] float32, lse: [rows] float32, of all that was seen, changed in place; more, more_lse: of one
    split, more in any dtype.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    before = tl.load(lse + row, mask=live, other=0.0)
    after = tl.load(more_lse + row, mask=live, other=0.0)
    peak = tl.maximum(before, after)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(after - peak)
    whole = tl.exp(before - peak) + weight
    nothing = whole == 0.0
    whole = tl.where(nothing, 1.0, whole)
    share = weight / whole
    tl.debug_barrier()  # every warp has read what one is about to write
    tl.store(lse + row, tl.where(nothing, float("-inf"), peak + tl.log(whole)), mask=live)
    channel = tl.arange(0, WIDE)
    inside = live[:, None] & (channel < dim)[None, :]
    at = row.to(tl.int64)[:, None] * dim + channel[None, :]
    before = tl.load(mean + at, mask=inside, other=0.0)
    found = tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean + at, before + share[:, None] * (found - before), mask=inside)


def merge_states(mean: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """`online_softmax.merge_states` of float32, on a GPU."""
    rows, dim = lse.numel(), mean.shape[-1]
    with torch.cuda.device_of(mean):
        merge_split[(triton.cdiv(rows, ROWS.value),)](
            mean, lse, more.contiguous(), more_lse.contiguous(), rows, dim, WIDE=power_of_2(dim), num_warps=4
        )
