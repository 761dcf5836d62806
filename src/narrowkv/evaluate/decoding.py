"""How long a token takes to decode over a cache that is filled, by the wall clock."""

import os
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from narrowkv.errors import UnsupportedModelError
from narrowkv.integrations.probe import keeps_keys, text_config
from narrowkv.integrations.versions import CACHE

WARM_UP = 3  # steps that are not counted: tables are laid out, memory is touched for the first time


@torch.inference_mode()
def decoding(model: PreTrainedModel, cache: Any, ids: Tensor, steps: int) -> dict[str, Any]:
    """Median milliseconds of `steps` tokens of one sequence, decoded one after another by the whole model.

    cache: a filled one of any kind, which grows by these tokens. ids: [1, n] int64, whose last token is given each time.
    Returns plain data: decode_ms and decode_ms_least, that of the fastest (None where there are no steps), decode_steps, and
    load, how many processes wanted to run on this machine meanwhile, if the system reports it: times are longer then.
    Raises UnsupportedModelError where the model cannot count so far.
    """
    seconds = []
    token = ids[:, -1:].to(model.device)
    for step in range(WARM_UP + steps if steps else 0):
        start = time.perf_counter()
        try:
            model(token, **{CACHE: cache}, use_cache=True)
        except IndexError as error:  # learned positions end somewhere
            raise UnsupportedModelError(
                f"The model has no position after that many tokens ({error}); choose fewer."
            ) from error
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return {
        "decode_ms": 1e3 * statistics.median(seconds) if seconds else None,
        "decode_ms_least": 1e3 * min(seconds) if seconds else None,
        "decode_steps": steps,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


@torch.inference_mode()
def filled_dynamic(model: PreTrainedModel, ids: Tensor, tokens: int) -> DynamicCache:
    """transformers' own cache with `tokens` tokens of one sequence: those of ids [1, n] int64, again and again."""
    ids = ids[:, :tokens].to(model.device)
    cache = DynamicCache(config=text_config(model))
    model(ids, **{CACHE: cache}, use_cache=True)
    missing = tokens - ids.shape[1]
    for layer in attention_layers(cache) if missing else ():
        keys, values = (torch.cat([part] * (-(-missing // part.shape[2])), dim=2) for part in (layer.keys, layer.values))
        layer.update(keys[:, :, :missing], values[:, :, :missing])
    return cache


def nbytes_of(cache: DynamicCache) -> int:
    """Bytes of the keys and values in transformers' own cache."""
    return sum(part.nbytes for layer in attention_layers(cache) for part in (layer.keys, layer.values))


def attention_layers(cache: DynamicCache) -> list[Any]:
    """Its layers with keys and values."""
    return [layer for layer in cache.layers if keeps_keys(layer)]
