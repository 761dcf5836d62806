"""Training against a quantized cache: `quantized_attention`, and what trains adapters with it."""

from narrowkv.training.attention import QuantizedAttention, quantized_attention

__all__ = ["QuantizedAttention", "quantized_attention"]
