"""Whole models for `benchmarks.gpu`: time and memory of a decoded token, and the longest context that fits.

Random weights in the shape of Llama-2-7B and Llama-3-8B, in bfloat16; caches hold random elements. Steps run as transformers
runs them, one launch after the other, for both sides; ours also as one CUDA graph. The longest context is what remains of the
memory, once the model is there, over the bytes of a token, which are those that were allocated.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.gpu_parts import Row, Rows
from benchmarks.gpu_store import filled, quantizer
from narrowkv import Calibration, PackedCache, cuda_graph, get_recipe
from narrowkv.calibration import Fingerprint

HEAD_DIM = 128
MODELS = {
    "Llama-3-8B": {"num_key_value_heads": 8, "intermediate_size": 14_336, "vocab_size": 128_256},
    "Llama-2-7B": {"num_key_value_heads": 32, "intermediate_size": 11_008, "vocab_size": 32_000},
}
GRAPHS = ("nuq3-1%", "kivi-2")  # that are decoded by CUDA graphs too
RECIPES = ("narrow3", *GRAPHS)
STEPPED = ("nuq4-1%", *GRAPHS)
CASES = ((32_768, 1), (32_768, 8), (131_072, 1))
TINY = {"num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 1}


def model_of(name: str, device: torch.device, tiny: bool) -> LlamaForCausalLM:
    """A random model."""
    shape: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, **MODELS[name], **(TINY if tiny else {})}
    heads = shape["hidden_size"] // HEAD_DIM
    dtype = torch.float16 if tiny else torch.bfloat16
    config = LlamaConfig(num_attention_heads=heads, head_dim=HEAD_DIM, max_position_embeddings=2**20, dtype=dtype, **shape)
    with device:
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def empty(model: PreTrainedModel, name: str, backend: str = "cuda") -> PackedCache:
    """Our cache, with tables drawn at random."""
    config, device = model.config, model.device
    recipe, heads = get_recipe(name), config.num_key_value_heads
    pair = quantizer(recipe.keys, heads, device), quantizer(recipe.values, heads, device)
    layers = dict.fromkeys(range(config.num_hidden_layers), pair)
    shapes = dict.fromkeys(layers, (heads, HEAD_DIM))
    return PackedCache(model, Calibration(recipe, Fingerprint.of(model), layers, shapes), backend=backend)


def packed(model: PreTrainedModel, name: str, tokens: int, batch: int) -> PackedCache:
    """Our cache, full of random elements."""
    cache, device = empty(model, name), model.device
    for layer in cache.packed:
        layer.store = filled(name, tokens, batch, model.config.num_key_value_heads, device, model.dtype)
    for position_buffer in cache.position_buffers.values():
        position_buffer.append(torch.arange(cache.length, device=device).expand(batch, -1))
    return cache


def stepped(name: str, device: torch.device, tiny: bool) -> Row:
    """How far logits of single tokens behind a prompt, by the kernels and by a CUDA graph of them, are from plain torch's."""
    model, gpu = model_of("Llama-3-8B", device, True).float(), device.type == "cuda"
    prompt, steps = (50, 2) if tiny else (150, 140)
    ids = torch.randint(0, 64, (2, prompt + steps), device=device)
    torch.manual_seed(0)
    plain = _logits(model, empty(model, name, "torch"), ids, prompt, False)
    row: Row = {"recipe": name, "steps": steps}
    for kind, graph in (("launches", False), ("graph", True))[: 1 + gpu]:
        torch.manual_seed(0)
        found = _logits(model, empty(model, name), ids, prompt, graph)
        row[kind] = float((found - plain).norm() / plain.norm())
    return row


def _logits(model: PreTrainedModel, cache: PackedCache, ids: Tensor, prompt: int, graph: bool) -> Tensor:
    found = []
    with torch.inference_mode(), cuda_graph(model, cache) if graph else contextlib.nullcontext():
        model(input_ids=ids[:, :prompt], past_key_values=cache)
        for i in range(prompt, ids.shape[1]):
            found.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(found, dim=1)


def exact(model: PreTrainedModel, tokens: int, batch: int) -> DynamicCache:
    """The cache of transformers."""
    cache, config = DynamicCache(), model.config
    for layer in range(config.num_hidden_layers):
        shape = (2, batch, config.num_key_value_heads, tokens, HEAD_DIM)
        keys, values = torch.randn(shape, device=model.device, dtype=model.dtype)
        cache.update(keys, values, layer)
    return cache


def measured(model: PreTrainedModel, make: Callable[[], Any], batch: int, repeats: int, graph: bool) -> Row:
    """Milliseconds of a token, bytes of the cache and the peak of memory while decoding; or that memory was short. graph:
    whether steps run as a CUDA graph.
    """
    device = model.device
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    token = torch.ones(batch, 1, dtype=torch.int64, device=device)
    found = []
    try:
        cache = make()
        allocated = torch.cuda.memory_allocated() - before if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode(), cuda_graph(model, cache) if graph else contextlib.nullcontext():
            for repeat in range(repeats + 3):
                start = time.perf_counter()
                model(input_ids=token, past_key_values=cache)
                if gpu:
                    torch.cuda.synchronize()
                if repeat >= 3:
                    found.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"milliseconds": None, "why": "out of memory"}
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    return {"milliseconds": 1e3 * sorted(found)[len(found) // 2], "cache_bytes": allocated, "peak_bytes": peak}


def longest(model: PreTrainedModel, bytes_of_a_token: float) -> int:
    """How many tokens of one sequence fit the memory besides the model."""
    if model.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0] / bytes_of_a_token)


def rows(device: torch.device, tiny: bool) -> Rows:
    """What measures one row for each model, length, batch and cache."""
    for name in ("Llama-3-8B",) if tiny else MODELS:
        model = model_of(name, device, tiny)
        for tokens, batch in ((128, 1),) if tiny else CASES:
            for cache in ("DynamicCache, sdpa", *(RECIPES[:1] if tiny else RECIPES)):
                make: Callable[[], Any] = functools.partial(exact, model, tokens, batch)
                if cache in RECIPES:
                    make = functools.partial(packed, model, cache, tokens, batch)
                for graph in (False, True) if cache in GRAPHS and device.type == "cuda" else (False,):
                    known = {"model": name, "cache": cache, "tokens": tokens, "batch": batch, "graph": graph}
                    label = f"{name}, {cache}, {batch} x {tokens} tokens{', CUDA graph' if graph else ''}"
                    yield label, functools.partial(row, known, model, make, 2 if tiny else 20)
        del model, make


def row(known: Row, model: PreTrainedModel, make: Callable[[], Any], repeats: int) -> Row:
    found = measured(model, make, known["batch"], repeats, known["graph"])
    if found.get("cache_bytes"):
        found["longest"] = longest(model, found["cache_bytes"] / known["tokens"] / known["batch"])
    return {**known, **found}
