import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from narrowkv.attention import Rope


def test_rotation_is_that_of_the_model():
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    )
    module = LlamaRotaryEmbedding(config)
    x, positions = torch.randn(2, 4, 9, 16), torch.randint(0, 5000, (2, 9))
    expected, _ = apply_rotary_pos_emb(x, x, *module(x, positions))
    found = Rope(module.inv_freq, module.attention_scaling).rotate(x, positions)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_unrotated_by_the_angles_that_rotated_them(dtype, interleaved):
    rope = Rope(1 / 10_000 ** (torch.arange(6) / 6), 1.3, interleaved)  # rotary_dim 12 of 16, scaled as yarn does
    x, positions = torch.randn(2, 3, 9, 16).to(dtype), torch.randint(0, 5000, (2, 9))
    turned = rope.rotate(x, positions)
    assert rope.unrotate(turned, positions).dtype == torch.float64
    torch.testing.assert_close(rope.unrotate(turned, positions), x.double(), atol=8 * torch.finfo(dtype).eps, rtol=0)


def test_rotations_compose():
    """R(a) R(b) = R(a + b): what kernels rely on to rotate blocks by a small table."""
    rope = Rope(1 / 10_000 ** (torch.arange(8) / 8))
    x = torch.randn(1, 2, 5, 16)
    a, b = torch.randint(0, 300, (1, 5)), torch.randint(0, 300, (1, 5))
    torch.testing.assert_close(rope.rotate(rope.rotate(x, a), b), rope.rotate(x, a + b), atol=2e-4, rtol=1e-4)


def test_channels_beyond_the_rotary_part_are_left_alone():
    rope = Rope(torch.tensor([1.0, 0.1]))
    x = torch.randn(1, 1, 3, 8)
    turned = rope.rotate(x, torch.tensor([[0, 1, 2]]))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert not torch.equal(turned[:, :, 1, :4], x[:, :, 1, :4])
