"""Sizes as people write them."""

import pytest

from narrowkv.errors import BudgetError
from narrowkv.plan import parse_bytes, parse_tokens


def test_bytes():
    assert [parse_bytes(text) for text in ("80GB", "80 GiB", "79.2gib", "1024")] == [80 * 10**9, 80 * 2**30, 85040352460, 1024]


def test_tokens():
    assert [parse_tokens(text) for text in ("131072", "128K", "1M", "10,000,000", "0.5M")] == [
        2**17,
        2**17,
        2**20,
        10**7,
        2**19,
    ]


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "80XB", "1e9", "nan", "99999999999999TB"])
def test_anything_else_is_refused(text):
    with pytest.raises(BudgetError, match="is not a"):
        parse_bytes(text)
    with pytest.raises(BudgetError, match="is not a"):
        parse_tokens(text)
