"""The compiled forms of what is done to every new token on a CPU; memory goes to them by address, which takes no time."""

from typing import ClassVar

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.memory import HALVES, address
from narrowkv.codec.scheme import Scheme

KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
FEW = 2**15  # elements that are not worth a second thread
DOES_NOT_FIT = -1
INSTRUCTION_SETS = tuple(_kernels.instruction_sets())  # that this processor has


class Encoder:
    """The compiled form of `Quantizer.encode` for one scheme and its tables (contiguous, float32, on the CPU)."""

    SUPPORTS: ClassVar = (
        "datatype",
        "strategy",
        "group_size",
        "outliers",
        "smooth_alpha",
    )  # settings of a scheme that need not be as by default

    def __init__(
        self,
        scheme: Scheme,
        boundaries: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        lower: Tensor | None,
        upper: Tensor | None,
        smooth: Tensor | None = None,
    ):
        """smooth: [kv_heads, head_dim], what elements are divided by first."""

        def table(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.float().contiguous()

        self.smooth = smooth
        self.codec = _kernels.Codec(
            sharing=0 if scheme.static else ("token", "token_head", "channel").index(scheme.strategy) + 1,
            group=scheme.group_size or 0,
            outliers=scheme.outliers.fraction,
            boundaries=boundaries.float().contiguous(),
            scale=table(scale),
            zero=table(zero),
            lower=table(lower),
            upper=table(upper),
        )

    def __deepcopy__(self, memo: dict) -> "Encoder":
        """Tables never change, so a copy shares them."""
        return self

    def write(self, buffer: EncodeBuffer, first: int, x: Tensor, skip: Tensor | None) -> int | None:
        """Encode x [batch, kv_heads, tokens, head_dim] into the buffer from the token `first` on.

        Returns how many outliers the buffer then stores, which the caller lets it count; None where one does not fit 16 bits.
        """
        if self.smooth is not None:
            x = x.float() / self.smooth[:, None]
        x = x if x.dtype in KINDS else x.float()
        x = x if x.stride(3) == 1 else x.contiguous()
        skip = None if skip is None else skip.contiguous()  # referenced as long as its address is used
        skipped = 0 if skip is None else address(skip, torch.bool, shape=(x.shape[0], x.shape[2]))
        threads = 1 if x.numel() < FEW else torch.get_num_threads()
        while True:
            capacity = 0 if buffer.outlier_index is None else len(buffer.outlier_index)
            found = self.codec.encode(
                KINDS[x.dtype],
                x.data_ptr(),
                x.shape,
                x.stride(),
                skipped,
                buffer.codes.shape,
                first,
                buffer.addresses or locate(buffer),
                (buffer.outliers, capacity),
                threads,
            )
            if found == DOES_NOT_FIT:
                return None
            if found <= capacity - buffer.outliers:
                return buffer.outliers + found
            buffer.reserve(found)


def all_finite(*tensors: Tensor) -> bool:
    """Whether no element is NaN or infinite; compiled for [batch, kv_heads, tokens, head_dim] on the CPU, in KINDS."""
    for x in tensors:
        if x.is_cpu and x.dtype in KINDS and x.dim() == 4 and x.stride(3) == 1:
            threads = 1 if x.numel() < FEW else torch.get_num_threads()
            finite = _kernels.all_finite(KINDS[x.dtype], x.data_ptr(), x.shape, x.stride(), threads)
        else:  # in one pass, since both ends show either
            finite = x.numel() == 0 or bool(torch.stack(torch.aminmax(x)).isfinite().all())
        if not finite:
            return False
    return True


def locate(buffer: EncodeBuffer) -> tuple[int, ...]:
    """Where codes, scale, zero, outlier_index and outlier_values begin, 0 for what is not there; the buffer keeps it."""
    kinds = KINDS if buffer.scheme.bits == 16 else (torch.uint8,)
    ranges = (address(buffer.ranges.get(name), torch.float16) for name in ("scale", "zero"))
    outliers = address(buffer.outlier_index, torch.int64), address(buffer.outlier_values, *HALVES)
    buffer.addresses = (address(buffer.codes, *kinds), *ranges, *outliers)
    return buffer.addresses
