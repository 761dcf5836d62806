"""Sizes as people write them: 80GB, 79.2GiB, 128K, 1M tokens."""

import re

from narrowkv.errors import BudgetError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
COUNTS = {"": 1, "K": 2**10, "M": 2**20}  # as context lengths are written: 128K is 131,072


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `80GB` (10^9 each) or `80GiB` (2^30 each); raises BudgetError where it is none."""
    return _parse(text, UNITS, "a size such as 80GB or 79.2GiB")


def parse_tokens(text: str) -> int:
    """Tokens of a length such as `131072`, `128K` (2^10 each) or `1M` (2^20 each); raises BudgetError where it is none."""
    return _parse(text, COUNTS, "a number of tokens such as 131072, 128K or 1M")


def _parse(text: str, units: dict[str, int], wanted: str) -> int:
    match = re.fullmatch(r"\s*(\d[\d,_]*(?:\.\d+)?)\s*([a-z]*)\s*", text, flags=re.IGNORECASE)
    size = 0.0
    if match and match[2].upper() in units:
        size = float(re.sub("[,_]", "", match[1])) * units[match[2].upper()]
    if not 1 <= size < 2**62:
        raise BudgetError(f"{text!r} is not {wanted}.")
    return int(size)
