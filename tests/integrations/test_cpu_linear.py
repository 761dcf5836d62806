"""Models in 16 bits on processors that have no such products."""

import pytest
import torch
from tests.conftest import make_tiny

from narrowkv.integrations import observer, preparation
from narrowkv.integrations.calibrator import observe_layers
from narrowkv.integrations.cpu_linear import lacks_products, multiply_in_float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_layers_multiply_in_float32_and_round(dtype):
    model, plain = (make_tiny(dtype=dtype, layers=1) for _ in range(2))
    multiply_in_float32(model)
    x = torch.randn(3, model.config.hidden_size).to(dtype).requires_grad_()
    layer = model.model.layers[0].mlp.up_proj
    found = layer(x)
    assert torch.equal(found, (x.float() @ layer.weight.float().T).to(dtype))
    found.float().sum().backward()
    assert x.grad.dtype == dtype and x.grad.any()
    ids = torch.randint(2, 97, (1, 20))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=0.3, rtol=0.05)


def test_other_dtypes_are_left_alone():
    model = make_tiny(layers=1)
    multiply_in_float32(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not lacks_products(torch.float32, torch.device("cpu"))
    assert not lacks_products(torch.bfloat16, torch.device("cuda"))


def test_calibration_goes_back_through_attention_in_float32(monkeypatch):
    model = make_tiny(dtype=torch.bfloat16)
    info, ids = preparation.prepare(model), torch.randint(2, 97, (1, 30))
    went = []

    def attention(module, query, *args, **kwargs):
        went.append((query.dtype, torch.is_grad_enabled()))
        return attend(module, query, *args, **kwargs)

    def gradients(lacks):
        found = []
        monkeypatch.setattr(observer, "lacks_products", lambda dtype, device: lacks)
        observe_layers(
            model, info, [ids], lambda i, keys, rotated, values, rope_state: values.register_hook(found.append), gradients=True
        )
        return torch.stack(found).float()

    attend = observer.model_attention
    monkeypatch.setattr(observer, "model_attention", attention)
    plain, wide = gradients(False), gradients(True)
    assert went == [(torch.bfloat16, True)] * 2 + [(torch.float32, True)] * 2
    assert 0 < (wide - plain).norm() < 0.1 * plain.norm()  # they round apart
    observe_layers(model, info, [ids], lambda *shown: None)
    assert went[4:] == [(torch.bfloat16, False)] * 2
