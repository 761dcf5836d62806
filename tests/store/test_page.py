"""Pages as a GPU fills them, by interpreted kernels and counts that it alone knows, against those that the host fills."""

import pytest
import torch

from narrowkv.codec import Encoded, Quantizer, Scheme, cuda
from narrowkv.store import LayerStore
from narrowkv.store.page import Page, to_blocks

SCHEME = Scheme(3, "int", outliers=0.02)
HEADS, DIM = 2, 56


def encoded(batch, tokens):
    return Quantizer(SCHEME).encode(torch.randn(batch, HEADS, tokens, DIM).half())


def counted(exact, free):
    """The same as a GPU leaves it: outliers in any order, then what does not count."""
    order = torch.randperm(len(exact.outlier_index))
    index = torch.cat([exact.outlier_index[order], torch.randint(0, exact.codes.numel(), (free,))])
    values = torch.cat([exact.outlier_values[order], torch.full((free,), torch.nan).half()])
    return Encoded(exact.codes, exact.ranges, index, values, torch.tensor([len(order)], dtype=torch.int32))


@pytest.mark.parametrize("exactly", [True, False], ids=["fitted", "with room"])
@pytest.mark.parametrize("batch", [1, 3])
def test_outliers_find_their_place_whoever_counted_them(batch, exactly):
    parts = [encoded(batch, tokens) for tokens in (64, 128, 64)]
    first, second, third = parts
    for mixed in ((counted(first, 9), second, third), (counted(first, 30), counted(second, 60), counted(third, 0)), parts):
        blocks = [to_blocks(part) for part in mixed]
        page = Page.allocate((Quantizer(SCHEME),) * 2, 4 * batch, blocks[0], blocks[0], exactly=exactly)
        slots = []
        for part in blocks:
            assert exactly or page.fits(part, part)
            slots += page.put(part, part)
            if not exactly:
                page.commit()
        page.commit()
        assert slots == list(range(4 * batch))
        assert page.values.outlier_offsets[-1] == sum(len(part.outlier_index) for part in parts)
        assert page.values.outliers_used == sum(len(part.outlier_index) for part in mixed) <= len(page.values.outlier_index)
        start = 0
        for part in map(to_blocks, parts):
            stop = start + len(part.codes)
            found = page.values.take(torch.arange(start, stop))
            for ours, theirs in zip(found.tensors(), part.tensors(), strict=True):
                assert torch.equal(ours, theirs)
            start = stop


def test_a_page_with_room_tells_when_outliers_could_be_too_many():
    blocks = to_blocks(counted(encoded(1, 64), 20))
    page = Page.allocate((Quantizer(SCHEME),) * 2, 2, blocks, blocks, exactly=False)
    page.put(blocks, blocks)
    assert page.fits(blocks, blocks)
    more = to_blocks(counted(encoded(1, 64), 200))
    assert not page.fits(more, more)


@pytest.mark.skipif(cuda.kernels() is None, reason="needs Triton (`pip install triton`)")
@pytest.mark.parametrize(
    "schemes",
    [
        (SCHEME, Scheme(16, "exact")),
        (Scheme(2, "int", axis="channel", group=32), Scheme(4, "int", axis="token_head", group=8)),
    ],
    ids=["outliers", "groups"],
)
def test_a_prompt_is_stored_as_without_kernels(schemes, monkeypatch):
    stores = [LayerStore(*map(Quantizer, schemes)) for _ in range(2)]
    x = torch.randn(1, HEADS, 128, DIM).half()
    stores[0].append(x, x)
    monkeypatch.setattr(cuda, "runs_on", lambda device: True)
    stores[1].append(x, x)
    assert len(stores[0].columns) == 2
    for one, other in zip(*(store.columns[0].page.tensors() for store in stores), strict=True):
        assert torch.equal(one, other)
