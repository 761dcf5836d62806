"""Models as they are loaded: linear layers in bfloat16 where the processor has no such products."""

import torch
from tests.conftest import make_tiny

from narrowkv.integrations.models import multiply_in_float32


def test_linear_layers_multiply_in_float32_and_round():
    model, plain = (make_tiny(dtype=torch.bfloat16, layers=1) for _ in range(2))
    multiply_in_float32(model)
    x = torch.randn(3, model.config.hidden_size).bfloat16().requires_grad_()
    layer = model.model.layers[0].mlp.up_proj
    found = layer(x)
    assert torch.equal(found, (x.float() @ layer.weight.float().T).bfloat16())
    found.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.any()
    ids = torch.randint(2, 97, (1, 20))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=0.3, rtol=0.05)


def test_other_dtypes_are_left_alone():
    model = make_tiny(layers=1)
    multiply_in_float32(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
