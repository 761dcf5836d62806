import torch

from narrowkv.codec.datatypes import boundaries, floating_point, normal_float, uniform


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


def test_floating_point_has_the_levels_of_the_formats():
    assert (floating_point(4) * 6).tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    eight = floating_point(8) * 448
    assert len(eight) == 256 and eight[-2] == eight[-1] == 448 and (eight.diff() >= 0).all()
    x = torch.randn(1000) * 100
    nearest = eight[torch.bucketize(x, boundaries(eight))]
    expected = x.to(torch.float8_e4m3fn).float()
    assert ((nearest - x).abs() <= (expected - x).abs() + 1e-6).all()
