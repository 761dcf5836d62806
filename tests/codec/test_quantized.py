import pytest
import torch

from narrowkv.codec import Outliers, Quantization, Quantizer, Scheme

SCHEMES = [
    Scheme(Quantization(16, "exact")),
    Scheme(Quantization(3, "int")),
    Scheme(Quantization(2, "int", strategy="token_head"), outliers=Outliers(0.02)),
]


@pytest.fixture(params=SCHEMES, ids=["exact", "dense", "sparse"])
def quantizer(request):
    return Quantizer(request.param)


@pytest.mark.parametrize("tokens", [1, 40, 63])
def test_the_first_tokens_in_ascending_order(quantizer, tokens):
    x = torch.randn(3, 2, 63, 56)
    whole = quantizer.encode(x)
    if whole.outlier_index is not None:
        order = torch.randperm(len(whole.outlier_index))
        whole.outlier_index, whole.outlier_values = whole.outlier_index[order], whole.outlier_values[order]
    expected = quantizer.encode(x[:, :, :tokens])
    for ours, theirs in zip(whole.first(tokens).tensors(), expected.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_pick_sequences(quantizer):
    x = torch.randn(3, 2, 7, 56)
    rows = torch.tensor([2, 0, 0, 1])
    picked = quantizer.encode(x).rows(rows)
    assert torch.equal(quantizer.dequantize(picked), quantizer.dequantize(quantizer.encode(x))[rows])
