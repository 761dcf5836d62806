import pytest
import torch

from narrowkv.codec import Encoded, Quantizer, Scheme

SCHEMES = [Scheme(16, "exact"), Scheme(3, "int"), Scheme(2, "int", axis="token_head", outliers=0.02)]


@pytest.fixture(params=SCHEMES, ids=["exact", "dense", "sparse"])
def quantizer(request):
    return Quantizer(request.param)


def test_slices_joined_again_are_the_whole(quantizer):
    x = torch.randn(3, 2, 63, 56)
    whole = quantizer.encode(x)
    parts = [whole.slice(0, 1), whole.slice(1, 40), whole.slice(40, 63)]
    joined = Encoded.cat(parts)
    for ours, theirs in zip(joined.tensors(), whole.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_pick_sequences(quantizer):
    x = torch.randn(3, 2, 7, 56)
    rows = torch.tensor([2, 0, 0, 1])
    picked = quantizer.encode(x).rows(rows)
    assert torch.equal(quantizer.decode(picked), quantizer.decode(quantizer.encode(x))[rows])
