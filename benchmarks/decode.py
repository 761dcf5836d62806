"""Time per decoded token of a whole model over the packed cache and over others: `python -m benchmarks.decode [--json FILE]`.

A random Llama of 4 layers, 32 query heads over 8 KV heads of 128 channels, in bfloat16, narrower than real ones, so that
attention weighs more than it would there. Caches are filled layer by layer with random elements; tables of ours are drawn at
random as in `benchmarks.drawn`. The peers are DynamicCache with sdpa and with eager attention, transformers' QuantizedCache
where its packages are installed, and the same model in llama.cpp where that is. All take turns, and medians are compared. The
cache's part is what a step takes beyond one over a single token, in DynamicCache or in llama.cpp.
"""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, QuantizedCache

from benchmarks import llama
from benchmarks.drawn import HEAD_DIM, KV_HEADS, QUERY_HEADS, draw_at_random, random_quantizer
from benchmarks.running import CLOCKS, Clock, medians, options, parse_with_clock, write
from narrowkv import Calibration, PackedCache, get_recipe
from narrowkv.calibration import Fingerprint

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 4, 2048, 2048, 1024
RECIPES = ("narrow4", "narrow3", "narrow2", "nuq4-1%", "nuq2-1%", "kivi-2")
CHUNK = 4096  # tokens filled in at a time
QUANTIZED = {  # transformers' own, by name: package and options
    "quanto 4 bits": ("optimum.quanto", {"backend": "quanto", "nbits": 4}),
    "quanto 2 bits": ("optimum.quanto", {"backend": "quanto", "nbits": 2}),
    "hqq 4 bits": ("hqq", {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1}),
}


def make_model(tokens: int) -> LlamaForCausalLM:
    """A model with random weights, for sdpa."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2 * tokens,
        dtype=torch.bfloat16,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def twin(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A model of the same weights that computes attention in its own way."""
    other = copy.deepcopy(model, {id(part): part for part in model.parameters()})
    other.set_attn_implementation(attention)
    return other


def packed_cache(model: PreTrainedModel, name: str, tokens: int) -> PackedCache:
    """Our cache with tables and `tokens` tokens drawn at random."""
    recipe = get_recipe(name)
    layers = {i: (random_quantizer(recipe.keys), random_quantizer(recipe.values)) for i in range(LAYERS)}
    shapes = dict.fromkeys(layers, (KV_HEADS, HEAD_DIM))
    cache = PackedCache(model, Calibration(recipe, Fingerprint.of(model), layers, shapes), backend="cpu")
    for layer in cache.packed:
        with draw_at_random(layer.store):
            for start in range(0, tokens, CHUNK):
                new = torch.randn(2, 1, KV_HEADS, min(CHUNK, tokens - start), HEAD_DIM, dtype=torch.bfloat16)
                layer.store.append(new[0], new[1])
    for position_buffer in cache.position_buffers.values():
        position_buffer.append(torch.arange(tokens)[None])
    return cache


def filled(cache: Cache, tokens: int) -> Cache:
    """A cache of transformers with `tokens` tokens drawn at random, given at once, as a prompt is."""
    for layer in range(LAYERS):
        keys, values = torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16)
        cache.update(keys, values, layer)
    return cache


def step(model: PreTrainedModel, cache: Any) -> Callable[[], Any]:
    """Decode one token more."""
    token = torch.ones(1, 1, dtype=torch.int64)
    return torch.inference_mode()(lambda: model(token, past_key_values=cache))


def installed(package: str) -> bool:
    return importlib.util.find_spec(package.split(".")[0]) is not None


def measure(recipes: list[str], tokens: int, threads: int, repeats: int, clock: Clock) -> list[dict[str, Any]]:
    """One row for each cache."""
    sdpa = make_model(tokens)
    eager, ours = twin(sdpa, "eager"), twin(sdpa, "sdpa")
    steps: dict[str, Callable[[], Any]] = {
        "almost empty": step(sdpa, filled(DynamicCache(), 1)),
        "DynamicCache, sdpa": step(sdpa, filled(DynamicCache(), tokens)),
        "DynamicCache, eager": step(eager, filled(DynamicCache(), tokens)),
    }
    for name, (package, settings) in QUANTIZED.items():
        if installed(package):
            cache = QuantizedCache(config=sdpa.config, **settings)  # type: ignore[arg-type]
            steps[name] = step(sdpa, filled(cache, tokens))
    steps |= {name: step(ours, packed_cache(ours, name, tokens)) for name in recipes}
    if all(map(installed, llama.PACKAGES)):
        steps |= llama.steps(sdpa, tokens, threads)
    found = medians(steps, repeats, clock)
    empty, empty_llama = found.pop("almost empty"), found.pop(llama.EMPTY, 0.0)
    best = min(time for name, time in found.items() if name.startswith("DynamicCache"))
    rows = []
    for name, time in found.items():
        part = time - (empty_llama if name.startswith("llama.cpp") else empty)
        times = {"milliseconds": 1e3 * time, "cache_milliseconds": 1e3 * part}
        rows.append({"cache": name, "tokens": tokens, **times, "ratio": best / time, "cache_share": part / time})
    return rows


def main() -> None:
    parser = options(__doc__, RECIPES, repeats=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    arguments = parse_with_clock(parser)
    packages = {package for package, _ in QUANTIZED.values()} | set(llama.PACKAGES)
    for package in sorted(package for package in packages if not installed(package)):
        print(f"{package} is not installed, and left out")
    rows = []
    for tokens in arguments.tokens:
        for row in measure(arguments.recipes, tokens, arguments.threads, arguments.repeats, CLOCKS[arguments.clock]):
            rows.append(row)
            print(
                f"{row['cache']:>21}  {tokens} tokens  {row['milliseconds']:7.2f} ms a token  "
                f"{row['ratio']:5.2f} x DynamicCache  {row['cache_milliseconds']:7.2f} ms ({100 * row['cache_share']:.0f}%) "
                "of it for the cache",
                flush=True,
            )
    write(arguments.json, rows, repeats=arguments.repeats, threads=arguments.threads, clock=arguments.clock)


if __name__ == "__main__":
    main()
