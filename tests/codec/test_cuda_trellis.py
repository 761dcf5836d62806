"""The search for streams by a kernel in Triton against plain torch, bit for bit."""

import pytest
import torch
from tests.conftest import KERNEL_DEVICE

from narrowkv.codec import trellis
from narrowkv.codec.cuda import encode as cuda
from narrowkv.codec.cuda import trellis as cuda_trellis
from narrowkv.codec.gaussian_tables import gaussian_tables

pytestmark = pytest.mark.skipif(cuda.kernels() is None, reason="needs Triton (`pip install triton`)")


def searched(elements, weights, counts, tables):
    return cuda_trellis.search(elements, weights, counts, tables.entries() * trellis.GRID_STEP)


@pytest.mark.parametrize(
    ("counts", "rows", "by_row"),
    [((1, 1, 0, 1, 0, 0, 0), 3, True), ((0, 0, 1, 0, 1, 0, 0), 2, False), ((2, 0, 0, 0, 0, 1, 1), 1, False)],
)
def test_streams_are_those_of_plain_torch(counts, rows, by_row):
    """Of all rates; elements within the grid and far beyond it, some of them free."""
    n, tables = 8 * sum(counts[1:]), gaussian_tables()
    elements = (6000 * torch.randn(2, rows, n)).clamp(-(2**15), 2**15 - 1).to(torch.int16)
    weights = torch.randint(0, 2**16, (2, rows if by_row else 1, n), dtype=torch.int32)
    weights = weights.masked_fill(torch.rand(weights.shape) < 0.2, 0).to(torch.uint16)
    tables = trellis.TrellisTables(tables.high.to(KERNEL_DEVICE), tables.low.to(KERNEL_DEVICE))
    given = elements.to(KERNEL_DEVICE), weights.to(KERNEL_DEVICE), counts, tables
    assert torch.equal(searched(*given), trellis.encode_naive(*given))


def test_rows_do_not_depend_on_how_many_are_searched_at_a_time(monkeypatch):
    counts, tables = (0, 0, 0, 1, 0, 0, 0), gaussian_tables()
    elements = torch.randint(-(2**14), 2**14, (2, 3, 8), dtype=torch.int16)
    weights = torch.ones(2, 1, 8, dtype=torch.int32).to(torch.uint16)
    monkeypatch.setattr(cuda_trellis, "MOST_HISTORY", 2 * 2 * 8 * 128)
    assert torch.equal(searched(elements, weights, counts, tables), trellis.encode_naive(elements, weights, counts, tables))


def test_nothing_is_searched_where_nothing_has_codes():
    elements, weights = torch.empty(2, 3, 0, dtype=torch.int16), torch.empty(2, 1, 0, dtype=torch.uint16)
    assert searched(elements, weights, (1, 0, 0, 0, 0, 0, 0), gaussian_tables()).shape == (2, 3, 0)
