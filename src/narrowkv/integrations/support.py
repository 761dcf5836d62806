"""Which transformers models the packed cache serves, and what it must know of them."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from narrowkv.attention import Rope
from narrowkv.errors import UnsupportedModelError

FAMILIES = ("llama", "mistral", "qwen2")
MAX_HEAD_DIM = 512  # the index of an outlier in its block has 16 bits, one of them the sign
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class ModelFacts:
    """Of the decoder: layers, query_heads, kv_heads, head_dim, and the rotary embedding of stored keys."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    rope: Rope


def describe(model: PreTrainedModel) -> ModelFacts:
    """Facts of a model that is supported; raises UnsupportedModelError with the reason for one that is not."""
    config = model.config
    family = config.model_type
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"Models of type {family!r} are not supported yet (supported: {', '.join(FAMILIES)}); use DynamicCache."
        )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise UnsupportedModelError(
            f"A head_dim of {head_dim} is not supported (multiples of 8 up to {MAX_HEAD_DIM} are); use DynamicCache."
        )
    if len({parameter.device for module in attention_modules(model) for parameter in module.parameters()}) > 1:
        raise UnsupportedModelError("A model spread over several devices is not supported yet; load it on one device.")
    rotary: Any = model.base_model.rotary_emb
    if rotary.rope_type not in STATIC_ROPE:
        raise UnsupportedModelError(
            f"Rotary embeddings of type {rotary.rope_type!r} change with the length of the sequence and are not supported yet "
            f"(supported: {', '.join(STATIC_ROPE)}); use DynamicCache."
        )
    rope = Rope(rotary.inv_freq.detach().float(), float(rotary.attention_scaling))
    if 2 * len(rope.inverse_frequencies) != head_dim:
        raise UnsupportedModelError("Partial rotary embeddings are not supported yet; use DynamicCache.")
    return ModelFacts(config.num_hidden_layers, heads, config.num_key_value_heads, head_dim, rope)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules by layer."""
    found = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "k_proj")]
    return sorted(found, key=lambda module: int(module.layer_idx))  # type: ignore[arg-type]
