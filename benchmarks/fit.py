"""How long it takes to fit one layer of a 7-billion-parameter model: `python -m benchmarks.fit [--json FILE]`.

32,768 tokens x 4,096 channels of keys and of values, 16 sequences, statistics and codebooks, as `calibrate` does it: one for
the layer, then one for each pair of channels. The peer of the first in the same run is what the published code's method costs:
Lloyd's k-means over the raw normalised numbers, here on a sample and scaled up to all of them. Peak memory is the growth of
the process beside its input (Linux).
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowkv import get_recipe
from narrowkv.calibration import Fit
from narrowkv.calibration.learning import AnyFit
from narrowkv.calibration.point_fit import PointFit

HEADS, HEAD_DIM, TOKENS, SEQUENCES = 32, 128, 2048, 16
LLOYD_SAMPLE, LLOYD_ITERATIONS = 2**20, 50


def reset_peak() -> None:
    """Forget how large this process once was."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest resident size of this process since the last reset."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_input() -> list[tuple[Tensor, Tensor]]:
    """Numbers with outlier channels, and gradients of a heavy-tailed size: [tokens, heads, head_dim] float16 each."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(HEADS, HEAD_DIM, generator=generator).square() * 4 + 0.1
    shape = (TOKENS, HEADS, HEAD_DIM)
    pairs = []
    for _ in range(SEQUENCES):
        numbers = torch.randn(shape, generator=generator) * spread
        gradient = torch.randn(shape, generator=generator) * torch.rand(TOKENS, 1, 1, generator=generator)
        pairs.append((numbers.half(), gradient.half()))
    return pairs


def fit_layer(recipe_name: str, data: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Seconds for the keys and for the values of one layer, and bytes beside the input."""
    recipe, seconds = get_recipe(recipe_name), {}
    reset_peak()
    before = peak_bytes()
    for side, scheme in (("keys", recipe.keys), ("values", recipe.values)):
        start = time.perf_counter()
        fit: AnyFit = Fit(scheme) if scheme.codebook == "layer" else PointFit()
        for numbers, _ in data:
            fit.see_range(numbers)
        for numbers, gradient in data:
            fit.see_codebook(numbers, gradient)
        fit.quantizer((HEADS, HEAD_DIM), scheme)
        seconds[side] = time.perf_counter() - start
    return {
        "seconds_keys": seconds["keys"],
        "seconds_values": seconds["values"],
        "seconds": sum(seconds.values()),
        "bytes_beside_input": peak_bytes() - before,
    }


def lloyd(levels: int, data: list[tuple[Tensor, Tensor]]) -> float:
    """Seconds of Lloyd's weighted k-means on raw numbers, of all of them as a sample tells."""
    numbers = data[0][0].flatten()[:LLOYD_SAMPLE].float() / 4
    weights = data[0][1].flatten()[:LLOYD_SAMPLE].float().square()
    start = time.perf_counter()
    centers = numbers.quantile(torch.linspace(0.01, 0.99, levels))
    for _ in range(LLOYD_ITERATIONS):
        labels = torch.bucketize(numbers, (centers[1:] + centers[:-1]) / 2)
        mass = torch.bincount(labels, weights, minlength=levels)
        centers = torch.bincount(labels, weights * numbers, minlength=levels) / mass.clamp(min=1e-12)
    return (time.perf_counter() - start) * 2 * SEQUENCES * TOKENS * HEADS * HEAD_DIM / LLOYD_SAMPLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipe", default="nuq3-1%")
    parser.add_argument("--pairs", default="pair3-1%")
    arguments = parser.parse_args()
    data = make_input()
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name in (arguments.recipe, arguments.pairs):
        found = result[name] = fit_layer(name, data)
        print(f"fit of one 7B-shaped layer, {name}: {found['seconds']:.2f} s (keys {found['seconds_keys']:.2f}, ", end="")
        print(f"values {found['seconds_values']:.2f}), {found['bytes_beside_input'] / 1e6:.0f} MB beside the input")
    peer = lloyd(2 ** get_recipe(arguments.recipe).keys.code_bits, data)
    result |= {"seconds_lloyd_extrapolated": peer, "ratio": peer / result[arguments.recipe]["seconds"]}
    print(f"Lloyd's k-means on the raw numbers (extrapolated): {peer:.0f} s, {result['ratio']:.0f} times as long as the first")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
