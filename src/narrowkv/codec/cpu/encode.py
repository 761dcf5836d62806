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
        x = x if x.is_cpu and x.dtype in KINDS else x.cpu().float()
        x = x if x.stride(3) == 1 else x.contiguous()
        skip = None if skip is None else skip.contiguous()  # referenced as long as its address is used
        skipped = 0 if skip is None else address(skip, torch.bool, shape=(x.shape[0], x.shape[2]))
        threads = 1 if x.numel() < FEW else torch.get_num_threads()
        while True:
            free = 0 if buffer.outlier_index is None else len(buffer.outlier_index) - buffer.outliers
            found = self.codec.encode(
                KINDS[x.dtype],
                x.data_ptr(),
                x.shape,
                x.stride(),
                skipped,
                buffer.codes.shape[2],
                first,
                _addresses(buffer),
                free,
                threads,
            )
            if found == DOES_NOT_FIT:
                return None
            if found <= free:
                return buffer.outliers + found
            buffer.reserve(found)


def all_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite. x: [batch, kv_heads, tokens, head_dim] on the CPU, in a dtype of KINDS."""
    x = x if x.is_cpu and x.stride(3) == 1 else x.cpu().contiguous()
    threads = 1 if x.numel() < FEW else torch.get_num_threads()
    return _kernels.all_finite(KINDS[x.dtype], x.data_ptr(), x.shape, x.stride(), threads)


def _addresses(buffer: EncodeBuffer) -> tuple[int, ...]:
    """Of codes, scale, zero, and of where the next outlier goes."""
    codes = address(buffer.codes, torch.uint8)
    scale, zero = address(buffer.ranges.get("scale"), torch.float16), address(buffer.ranges.get("zero"), torch.float16)
    if buffer.outlier_index is None or buffer.outlier_values is None:
        return codes, scale, zero, 0, 0
    index, values = buffer.outlier_index, buffer.outlier_values
    used = buffer.outliers
    starts = address(index, torch.int64), address(values, *HALVES)
    return codes, scale, zero, starts[0] + used * index.itemsize, starts[1] + used * values.itemsize
