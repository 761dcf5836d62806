"""Rows and counts, as people name them."""

import operator
from typing import Any

import torch
from torch import Tensor

from narrowkv.errors import CacheUseError


def as_rows(rows: Any, batch: int) -> Tensor:
    """Rows of a batch as [n] int64 on the CPU.

    rows: integers, those below 0 counted from the end, or one bool for each row of the batch (True keeps it); a tensor,
    an array, a list or a single number. Raises CacheUseError where they do not name rows of the batch.
    """
    try:
        found = torch.as_tensor(rows, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise CacheUseError(f"Rows are integers, or a bool for each of the {batch}, not {rows!r}.") from error
    found = found.detach().flatten() if found.dim() < 2 else found
    if found.dim() == 1 and found.dtype == torch.bool:
        if len(found) != batch:
            raise CacheUseError(f"A mask over rows needs one bool for each of the {batch}, not {len(found)}.")
        found = found.nonzero().flatten()
    if found.dim() != 1 or found.is_floating_point() or found.is_complex() or not len(found):
        raise CacheUseError(f"Rows are one or more integers, or a bool for each of the {batch}, not {rows!r}.")
    found = found.to(torch.int64)
    if bool(((found < -batch) | (found >= batch)).any()):
        raise CacheUseError(
            f"There are {batch} sequences in the cache, numbered from 0; rows {found.tolist()} are not all there."
        )
    return found % batch


def as_count(number: Any, what: str) -> int:
    """An integer of any make; raises CacheUseError on others. what: of what it is the number."""
    try:
        return operator.index(number)
    except TypeError as error:
        raise CacheUseError(f"{what} is an integer, not {number!r}.") from error
