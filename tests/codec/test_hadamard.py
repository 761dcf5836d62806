import pytest
import torch

from narrowkv.codec import Quantization, Quantizer, Scheme, Transform
from narrowkv.codec.hadamard import rotate, rotate_back


@pytest.mark.parametrize("head_dim", [8, 56, 80, 128])
def test_the_rotation_is_orthogonal_and_comes_back(head_dim):
    x, y = torch.randn(2, 3, 5, head_dim), torch.randn(2, 3, 5, head_dim)
    torch.testing.assert_close(rotate_back(rotate(x)), x)
    torch.testing.assert_close((rotate(x) * rotate(y)).sum(-1), (x * y).sum(-1), atol=1e-4, rtol=1e-4)
    one = torch.zeros(head_dim)
    one[3] = 1
    assert (rotate(one) != 0).sum() == (head_dim & -head_dim)


def test_an_outlier_channel_no_longer_spoils_the_rest():
    x = torch.randn(1, 1, 200, 64)
    x[..., 5] *= 50
    error = {}
    for hadamard in (False, True):
        quantizer = Quantizer(Scheme(Quantization(4, "int", strategy="token_head"), Transform(hadamard=hadamard)))
        error[hadamard] = (quantizer.dequantize(quantizer.encode(x)) - x).square().mean().item()
    assert error[True] < 0.5 * error[False]
