"""Triton: what queries have found so far, and what they found in one more piece of keys, made one."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowkv.attention.triton_forms import power_of_2

ROWS = tl.constexpr(16)  # queries of a program


@triton.jit(do_not_specialize=["rows"])
def join_piece(mean, log_total, more, log_more, rows, dim, WIDE: tl.constexpr):
    """mean: [rows, dim] float32, log_total: [rows] float32, of all that was seen, changed in place; more, log_more: of one
    piece, more in any dtype.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    before = tl.load(log_total + row, mask=live, other=0.0)
    after = tl.load(log_more + row, mask=live, other=0.0)
    peak = tl.maximum(before, after)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp(after - peak)
    whole = tl.exp(before - peak) + weight
    nothing = whole == 0.0
    whole = tl.where(nothing, 1.0, whole)
    share = weight / whole
    tl.debug_barrier()  # every warp has read what one is about to write
    tl.store(log_total + row, tl.where(nothing, float("-inf"), peak + tl.log(whole)), mask=live)
    channel = tl.arange(0, WIDE)
    inside = live[:, None] & (channel < dim)[None, :]
    at = row.to(tl.int64)[:, None] * dim + channel[None, :]
    held = tl.load(mean + at, mask=inside, other=0.0)
    found = tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean + at, held + share[:, None] * (found - held), mask=inside)


def join(mean: Tensor, log_total: Tensor, more: Tensor, log_more: Tensor) -> None:
    """`softmax.join` of float32, on a GPU."""
    rows, dim = log_total.numel(), mean.shape[-1]
    with torch.cuda.device_of(mean):
        join_piece[(triton.cdiv(rows, ROWS.value),)](
            mean, log_total, more.contiguous(), log_more.contiguous(), rows, dim, WIDE=power_of_2(dim), num_warps=4
        )
