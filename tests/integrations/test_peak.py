"""What a decoding step allocates besides what is stored."""

import torch
from tests.store.test_memory import peak_bytes
from torch.profiler import ProfilerActivity, profile

from narrowkv import Outliers, PackedCache, Quantization, Recipe, Scheme, Transform, explain

TOKENS, BATCH = 32_768, 4
SPARSE = Recipe(
    "sparse",
    keys=Scheme(Quantization(4, "int"), Transform(pre_rope=True), Outliers(0.01)),
    values=Scheme(Quantization(4, "int"), outliers=Outliers(0.01)),
)


def test_a_decoding_step_at_long_context_holds_no_copy_of_the_past(tiny):
    model = tiny(heads=8, kv_heads=4, head_dim=64, layers=4).bfloat16()
    cache = PackedCache(model, SPARSE)
    chunk = torch.randn(BATCH, 4, 1024, 64, dtype=torch.bfloat16)
    for layer in cache.packed:
        for _ in range(TOKENS // 1024):
            layer.store.append(chunk, chunk)
    for position_buffer in cache.position_buffers.values():
        position_buffer.append(torch.arange(TOKENS).expand(BATCH, -1))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(torch.randint(2, 97, (BATCH, 1)), past_key_values=cache)
    peak = peak_bytes(profiler.profiler.kineto_results.events())
    assert peak <= 0.15 * (cache.nbytes + weights)
    assert explain(cache).nbytes == cache.nbytes
