"""The measurements of one layer for `benchmarks.gpu`: correctness, decoding, encoding and prompts, against torch in the same
run.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.drawn import HEAD_DIM, attention_inputs
from benchmarks.gpu_clock import copies, milliseconds
from benchmarks.gpu_store import another, bytes_of, filled
from narrowkv.attention import AttentionInputs, AttentionMask, naive, tiled
from narrowkv.attention.cuda import decode as cuda
from narrowkv.attention.cuda import prefill
from narrowkv.codec.outlier_counter import CountReadback
from narrowkv.store import BLOCK, LayerStore

Row = dict[str, Any]
Rows = Generator[tuple[str, Callable[[], Row]], None, None]  # what measures each, by a name
PREFILL = 2048
FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)  # torch's, each by itself


def drawn_step(store: LayerStore, heads: int, queries: int, device: torch.device, dtype: torch.dtype) -> AttentionInputs:
    """Attention of some queries, with a new token for each."""
    assert store.shape is not None
    batch, kv_heads, dim = store.shape
    new = torch.randn(2, batch, kv_heads, queries, dim, device=device, dtype=dtype)
    query = torch.randn(batch, heads, queries, dim, device=device, dtype=dtype)
    return attention_inputs(store, query, (new[0], new[1]))


def correctness(name: str, tokens: int, batch: int, heads: tuple[int, int], queries: int, device: torch.device) -> Row:
    """The relative error of attention in 32 and in 16 bits against the naive reference in float32; not a number counts as
    such.
    """
    row: Row = {"recipe": name, "tokens": tokens, "batch": batch, "heads": list(heads), "queries": queries}
    store = filled(name, tokens, batch, heads[1], device, torch.float16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if dtype == torch.bfloat16 and device.type != "cuda":
            continue  # the interpreter has none
        inputs = drawn_step(store, heads[0], queries, device, dtype)
        shown = [inputs.mask]
        if queries > tiled.FEW_QUERIES:  # prompts take another operator where a mask says what is seen
            index = torch.arange(store.length + queries, device=device)
            shown.append(AttentionMask(index >= 40 * torch.arange(batch, device=device)[:, None], tokens // 2))
        errors = torch.tensor([_error(replace(inputs, mask=some), store) for some in shown])
        row[str(dtype).removeprefix("torch.")] = errors.amax().item()  # NaN if one is
    return row


def _error(inputs: AttentionInputs, store: LayerStore) -> float:
    expected = naive.attend(inputs.with_query(inputs.query.double()), store)
    return float((cuda.attend(inputs, store) - expected).norm() / expected.norm())


def decoding(name: str, tokens: int, batch: int, heads: tuple[int, int], device: torch.device, copied: float) -> Row:
    """Milliseconds of one layer's attention of one token, and the share of the bandwidth of a copy."""
    store = filled(name, tokens, batch, heads[1], device, torch.bfloat16)
    size = bytes_of(store)
    stores = [store, *(another(store) for _ in range(copies(size, device) - 1))]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    calls = [cuda.prepare(drawn_step(one, heads[0], 1, device, dtype), one) for one in stores]
    time = milliseconds(calls, device)
    return {
        "recipe": name, "tokens": tokens, "batch": batch, "heads": list(heads), "milliseconds": time, "bytes": size,
        "share_of_bandwidth": size / time / 1e6 / copied,
    }  # fmt: skip


def peers(tokens: int, batch: int, heads: tuple[int, int], device: torch.device) -> dict[str, float]:
    """Milliseconds of the same over keys and values in 16 bits, by what torch has, and by packages that are installed."""
    shape = (2, batch, heads[1], tokens, HEAD_DIM)
    size = 2 * 2 * batch * heads[1] * tokens * HEAD_DIM
    dtype = torch.bfloat16
    pairs = [torch.randn(shape, device=device, dtype=dtype) for _ in range(copies(size, device, 0.6))]
    query = torch.randn(batch, heads[0], 1, HEAD_DIM, device=device, dtype=dtype)
    rows = query.view(batch, heads[1], -1, HEAD_DIM)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    layouts: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "sdpa": lambda keys, values: sdpa(query, keys, values, enable_gqa=True),
        "sdpa, a group as rows": lambda keys, values: sdpa(rows, keys, values),
    }
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        layouts["flash_attn"] = lambda keys, values: flash_attn_with_kvcache(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        )
    if importlib.util.find_spec("flashinfer") and batch == 1:
        import flashinfer

        layouts["flashinfer"] = lambda keys, values: flashinfer.single_decode_with_kv_cache(
            query[0, :, 0], keys[0], values[0], kv_layout="HND"
        )
    found = {}
    for name, layout in layouts.items():
        for kernel in FUSED if name.startswith("sdpa") and device.type == "cuda" else (None,):
            asked = sdpa_kernel(kernel) if kernel else contextlib.nullcontext()
            with contextlib.suppress(RuntimeError), asked:  # not all have all
                kind = f"{name}, {kernel.name.lower().removesuffix('_attention')}" if kernel else name
                found[kind] = milliseconds([functools.partial(layout, pair[0], pair[1]) for pair in pairs], device)
    return found


def encoding(
    name: str, tokens: int, batch: int, heads: tuple[int, int], device: torch.device, tokens_appended: int = 128
) -> Row:
    """Milliseconds of storing one token in a layer: the device's part of a step, `append` as the host calls it (the mean of
    `tokens_appended`, blocks sealed on the way), and a token of a chunk of a prompt.
    """
    store = filled(name, tokens, batch, heads[1], device, torch.bfloat16)
    new = torch.randn(2, batch, heads[1], 1, HEAD_DIM, device=device, dtype=torch.bfloat16)
    row: Row = {"recipe": name, "batch": batch, "heads": list(heads)}
    fresh = another(store)  # steps that are done again and again count as many tokens on the device as they are done
    if store.prepare_step(new[0], new[1]):  # on a GPU
        offsets = torch.zeros(2, dtype=torch.int32, device=device)
        row["step"] = milliseconds([lambda: store.write(new[0], new[1], offsets=offsets)] * 16, device)

    readback = CountReadback()

    def some() -> None:
        for _ in range(tokens_appended):
            readback.receive()
            fresh.append(new[0], new[1])
            readback.send(fresh.counters())

    chunk = torch.randn(2, batch, heads[1], min(PREFILL, tokens), HEAD_DIM, device=device, dtype=torch.bfloat16)
    one = milliseconds([some], device, repeats=3, graph=False) / tokens_appended
    many = milliseconds([lambda: fresh.append(chunk[0], chunk[1])], device, repeats=3, graph=False)
    return {**row, "append": one, "prompt_token": many / chunk.shape[3]}


def prompts(name: str, tokens: int, heads: tuple[int, int], device: torch.device) -> Row:
    """Milliseconds of attention of a chunk of a prompt behind `tokens` others, of decoding those, and of torch's over all in
    16 bits.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    store = filled(name, tokens, 1, heads[1], device, dtype)
    new = min(PREFILL, tokens)
    inputs = drawn_step(store, heads[0], new, device, dtype)
    keys, values = torch.randn(2, 1, heads[1], tokens + new, HEAD_DIM, device=device, dtype=dtype)
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, inputs.query, keys, values, enable_gqa=True)
    mask = torch.ones(new, tokens + new, dtype=torch.bool, device=device).tril(tokens)
    exact = tiled.with_products_dtype(replace(inputs, new=(keys[:, :, tokens:], values[:, :, tokens:])))
    segments = [(0, keys[:, :, :tokens], values[:, :, :tokens])]
    found = _milliseconds_of(
        {
            "ours": lambda: cuda.attend(inputs, store),
            "decoding": lambda: list(map(len, prefill.stored_chunks(inputs, store))),
            "the same of 16 bits": lambda: tiled.attend_chunks(exact, segments),
            "sdpa, causal from the last": lambda: sdpa(attn_mask=causal_lower_right(new, tokens + new)),
            "sdpa, mask": lambda: sdpa(attn_mask=mask),
        },
        device,
    )
    return {"recipe": name, "tokens": tokens, "new": new, "heads": list(heads), **_against_sdpa(found)}


def whole_prompts(name: str, new: int, heads: tuple[int, int], device: torch.device) -> Row:
    """Milliseconds of attention of a prompt read in one go and of appending it, and of torch's attention alone."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    store = filled(name, BLOCK, 1, heads[1], device, dtype)
    keys, values = torch.randn(2, 1, heads[1], new, HEAD_DIM, device=device, dtype=dtype)
    query = torch.randn(1, heads[0], new, HEAD_DIM, device=device, dtype=dtype)
    inputs = replace(attention_inputs(store, query, (keys, values)), past=0, rope_state=None)
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, query, keys, values, enable_gqa=True)

    def ours() -> None:
        store.reset()
        cuda.attend(inputs, store)
        store.append(keys, values)

    found = _milliseconds_of({"ours": ours, "sdpa": lambda: sdpa(is_causal=True)}, device)
    return {"recipe": name, "tokens": 0, "new": new, "heads": list(heads), **_against_sdpa(found)}


def _milliseconds_of(layouts: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Of each; torch's by the kernel that it takes by itself, if one runs."""
    found = {}
    for name, layout in layouts.items():
        with contextlib.suppress(*([RuntimeError] if name.startswith("sdpa") else [])):
            found[name] = milliseconds([layout], device, repeats=5, graph=False)
    return found


def _against_sdpa(found: dict[str, float]) -> Row:
    best = min((time for name, time in found.items() if name.startswith("sdpa")), default=float("nan"))
    return {"milliseconds": found["ours"], "sdpa": best, "each": found}
