"""Addresses of tensors, for compiled code that trusts what it is given of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from narrowkv.errors import NarrowKVError

HALVES = (torch.float16, torch.bfloat16)


def address(tensor: Tensor | None, *dtypes: torch.dtype, shape: Sequence[int] | None = None) -> int:
    """Where the elements of a tensor lie, 0 for None.

    Raises NarrowKVError unless they are of one of these dtypes, in this shape if one is given, side by side, on the CPU.
    """
    if tensor is None:
        return 0
    if (
        tensor.dtype not in dtypes
        or not tensor.is_cpu
        or not tensor.is_contiguous()
        or (shape and tensor.shape != tuple(shape))
    ):
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise NarrowKVError(
            f"A kernel was given {tensor.dtype} {list(tensor.shape)} on {tensor.device} where it takes {wanted} "
            f"{'' if shape is None else list(shape)} side by side on the CPU; this is a fault of NarrowKV, please report it."
        )
    return tensor.data_ptr()
