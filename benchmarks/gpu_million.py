"""A million tokens on one card, for real: `python -m benchmarks.gpu_million [--recipe nuq2-1%] [--tokens 1000000] [--out
FOLDER]`.

Holds the caches of 32 layers of 32 KV heads of 128 channels, filled with the bytes of random elements in memory of their own,
and decodes over all of them: attention of one token in every layer, by CUDA graphs, and its median. The weights of a model are
not there; what they would take is given. From the bytes measured follows the layout of ten million tokens on eight cards,
whole layers to a card: `--layout` alone computes it from one layer that is stored here, on any device.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import facts
from benchmarks.gpu_clock import bandwidth, milliseconds
from benchmarks.gpu_parts import drawn_step
from benchmarks.gpu_store import bytes_of, filled
from narrowkv.attention.cuda import decode as cuda

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 32, 32, 128
POSITION_BYTES = 4  # of a token, once for all layers
WEIGHT_BYTES = 2 * 6_738_415_616  # Llama-2-7B in 16 bits
SAMPLE = 4096  # tokens by which a layer is measured where it is not stored whole


def layout(bytes_of_a_token: float, fixed_bytes: float, tokens: int, cards: int, card_bytes: float) -> dict[str, Any]:
    """Whole layers to each card, as even as can be, and the bytes that the fullest holds, with its share of the weights.

    fixed_bytes: bytes of a layer that do not grow: tail, sinks, window.
    """
    layers = -(-LAYERS // cards)
    cache = layers * (bytes_of_a_token * tokens + fixed_bytes) + POSITION_BYTES * tokens
    whole = cache + WEIGHT_BYTES * layers / LAYERS
    return {
        "tokens": tokens, "cards": cards, "layers_of_a_card": layers, "cache_bytes_of_a_card": int(cache),
        "bytes_of_a_card": int(whole), "card_bytes": int(card_bytes), "fits": whole <= card_bytes,
    }  # fmt: skip


def measured(recipe: str, tokens: int, layers: int, device: torch.device) -> dict[str, Any]:
    """Bytes of all caches, and milliseconds of decoding one token over all of them."""
    stores = [filled(recipe, tokens, 1, KV_HEADS, device, torch.bfloat16) for _ in range(layers)]
    nbytes = sum(bytes_of(store) for store in stores) + POSITION_BYTES * tokens
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    calls = [cuda.prepare(drawn_step(store, HEADS, 1, device, dtype), store) for store in stores]
    time = milliseconds(calls, device) * layers
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "layers": layers, "tokens": stores[0].length, "cache_bytes": nbytes, "peak_bytes": peak,
        "attention_milliseconds": time, "gigabytes_per_second": nbytes / time / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="nuq2-1%")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--card-gigabytes", type=float, default=141.0)
    parser.add_argument("--layout", action="store_true", help="only compute the layout, from a layer of a few tokens")
    parser.add_argument("--out", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    few, more = (bytes_of(filled(arguments.recipe, n * SAMPLE, 1, KV_HEADS, device, torch.bfloat16)) for n in (1, 2))
    bytes_of_a_token = (more - few) / SAMPLE
    of_layer = (bytes_of_a_token, few - bytes_of_a_token * SAMPLE)
    found: dict[str, Any] = {
        "facts": facts(device),
        "recipe": arguments.recipe,
        "bytes_of_a_token_and_layer": bytes_of_a_token,
        "one_card": layout(*of_layer, arguments.tokens, 1, 1e9 * arguments.card_gigabytes),
        "eight_cards": layout(*of_layer, 10_000_000, 8, 1e9 * arguments.card_gigabytes),
    }
    if not arguments.layout:
        found["copy_gigabytes_per_second"] = bandwidth(device)
        found["measured"] = measured(arguments.recipe, arguments.tokens, arguments.layers, device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"million-{arguments.recipe.replace('%', '')}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
