"""Pages: outliers are sorted, and kernels of a GPU, interpreted, fill them as plain torch does."""

import pytest
import torch

from narrowkv.codec import Outliers, Quantization, QuantizedTensor, Quantizer, Scheme
from narrowkv.codec.cuda import encode as cuda
from narrowkv.store import LayerStore
from narrowkv.store.page import Page, to_blocks

SCHEME = Scheme(Quantization(3, "int"), outliers=Outliers(0.02))
HEADS, DIM = 2, 56


def encoded(batch, tokens):
    return Quantizer(SCHEME).encode(torch.randn(batch, HEADS, tokens, DIM).half())


def shuffled(exact):
    """The same as a GPU leaves it: outliers in any order."""
    order = torch.randperm(len(exact.outlier_index))
    return QuantizedTensor(exact.codes, exact.ranges, exact.outlier_index[order], exact.outlier_values[order])


@pytest.mark.parametrize("exactly", [True, False], ids=["fitted", "with space"])
@pytest.mark.parametrize("batch", [1, 3])
def test_outliers_are_sorted_whatever_order_they_come_in(batch, exactly):
    parts = [encoded(batch, tokens) for tokens in (64, 128, 64)]
    blocks = [to_blocks(shuffled(part)) for part in parts]
    page = Page.allocate((Quantizer(SCHEME),) * 2, 4 * batch, blocks[0], blocks[0], exactly=exactly)
    slots = []
    for part in blocks:
        assert exactly or page.fits(part, part)
        slots += page.put(part, part)
        if not exactly:
            page.commit()
    page.commit()
    assert slots == list(range(4 * batch))
    assert page.values.outlier_offsets[-1] == page.values.outliers_used == sum(len(part.outlier_index) for part in parts)
    start = 0
    for part in map(to_blocks, parts):
        stop = start + len(part.codes)
        found = page.values.take(torch.arange(start, stop))
        for ours, theirs in zip(found.tensors(), part.tensors(), strict=True):
            assert torch.equal(ours, theirs)
        start = stop


@pytest.mark.skipif(cuda.kernels() is None, reason="needs Triton (`pip install triton`)")
@pytest.mark.parametrize(
    "schemes",
    [
        (SCHEME, Scheme(Quantization(16, "exact"))),
        (
            Scheme(Quantization(2, "int", strategy="channel", group_size=32)),
            Scheme(Quantization(4, "int", strategy="token_head", group_size=8)),
        ),
    ],
    ids=["outliers", "groups"],
)
def test_a_prompt_is_stored_as_without_kernels(schemes, monkeypatch):
    stores = [LayerStore(*map(Quantizer, schemes)) for _ in range(2)]
    x = torch.randn(1, HEADS, 128, DIM).half()
    stores[0].append(x, x)
    monkeypatch.setattr(cuda, "runs_on", lambda device: True)
    stores[1].append(x, x)
    assert len(stores[0].blocks.columns) == 2
    for one, other in zip(*(store.blocks.columns[0].page.tensors() for store in stores), strict=True):
        assert torch.equal(one, other)
