"""Products of 16 bits on processors that have none, for which torch takes ten times as long: in float32, and rounded."""

import functools

import torch
from torch import Tensor, nn


def lacks_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether elements of 16 bits are multiplied on a processor that has no instructions for it."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in known and not known[dtype]()


def multiply_in_float32(model: nn.Module) -> None:
    """Let linear layers in 16 bits multiply in float32; results are rounded, as those of products of 16 bits are."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype.itemsize == 2:
            module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.float()
    return nn.functional.linear(x.float(), module.weight.float(), bias).to(x.dtype)
