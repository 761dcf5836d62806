import torch

from narrowkv.codec.datatypes import boundaries, normal_float, uniform


def test_normal_float_has_the_published_levels():
    published = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    published += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]  # QLoRA, appendix E
    torch.testing.assert_close(normal_float(4), torch.tensor(published), atol=1e-4, rtol=0)


def test_every_datatype_spans_the_range_in_order():
    for bits in (2, 3, 4):
        for codebook in (uniform(bits), normal_float(bits)):
            assert len(codebook) == 2**bits
            assert codebook[0] == -1 and codebook[-1] == 1
            assert (codebook.diff() > 0).all()


def test_boundaries_choose_the_nearest_level():
    codebook = torch.tensor([-1.0, -0.2, 0.1, 1.0])
    x = torch.linspace(-1.2, 1.2, 1001)
    nearest = (x[:, None] - codebook).abs().argmin(1)
    assert torch.equal(torch.bucketize(x, boundaries(codebook)), nearest)
