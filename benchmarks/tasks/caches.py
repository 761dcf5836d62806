"""Caches of every kind that is compared: the model's own, packed ones, and transformers' QuantizedCache."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache

from narrowkv import PackedCache
from narrowkv.evaluate.decoding import attention_layers
from narrowkv.evaluate.perplexity import Source
from narrowkv.integrations.probe import text_config

CHUNK = 2048  # tokens of a long prompt that are read at a time


@dataclass(frozen=True)
class Quantized:
    """transformers' QuantizedCache, with the axes that each library's kernels expect. Its last 128 tokens are exact."""

    backend: str
    width: int

    def settings(self) -> dict[str, Any]:
        """Arguments of the class, besides backend and model."""
        return {"nbits": self.width} | ({"axis_key": 1, "axis_value": 1} if self.backend == "hqq" else {})


Kind = Source | Quantized | None  # None: the model's own cache
PEERS = {f"{backend} int{width}": Quantized(backend, width) for backend in ("quanto", "hqq") for width in (4, 2)}


def empty(model: PreTrainedModel, kind: Kind) -> Any:
    """A cache of a kind, without tokens."""
    if kind is None:
        return DynamicCache(config=text_config(model))
    if isinstance(kind, Quantized):
        return QuantizedCache(kind.backend, text_config(model), **kind.settings())
    return PackedCache(model, kind)


@torch.inference_mode()
def read(model: Any, ids: Tensor) -> DynamicCache:
    """The model's own cache of a prompt [1, tokens], read in chunks."""
    cache = empty(model, None)
    for chunk in ids.split(CHUNK, dim=1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.inference_mode()
def filled(model: PreTrainedModel, kind: Kind, prompt: DynamicCache) -> Any:
    """A cache of a kind with the tokens of a prompt that was read exactly, as `generate` fills it."""
    if kind is None:
        return copied(prompt)
    if isinstance(kind, Quantized):
        cache = empty(model, kind)
        for i, layer in enumerate(attention_layers(prompt)):
            cache.update(layer.keys, layer.values, i)
        return cache
    return PackedCache.from_cache(model, kind, prompt)


def copied(cache: Any) -> Any:
    """A cache to continue independently; transformers' layers replace their tensors as they grow, so these are shared."""
    if isinstance(cache, PackedCache):
        return copy.deepcopy(cache)
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found
