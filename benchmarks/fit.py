"""How long it takes to fit one layer of a 7-billion-parameter model: `python -m benchmarks.fit [--json FILE]`.

32,768 tokens x 4,096 channels of keys and of values, 16 sequences, statistics and codebook, as `calibrate` does it. The peer
in the same run is what the published code's method costs: Lloyd's k-means over the raw normalised numbers, here on a sample
and scaled up to all of them. Peak memory is the growth of the process beside its input.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch import Tensor

from narrowkv import get_recipe
from narrowkv.calibration import Fit

HEADS, HEAD_DIM, TOKENS, SEQUENCES = 32, 128, 2048, 16
LLOYD_SAMPLE, LLOYD_ITERATIONS = 2**20, 50


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
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
    """Seconds for the keys and for the values of one layer."""
    recipe, seconds = get_recipe(recipe_name), {}
    for side, scheme in (("keys", recipe.keys), ("values", recipe.values)):
        start = time.perf_counter()
        fit = Fit(scheme)
        for numbers, _ in data:
            fit.see_range(numbers)
        for numbers, gradient in data:
            fit.see_codebook(numbers, gradient)
        fit.quantizer((HEADS, HEAD_DIM), scheme)
        seconds[side] = time.perf_counter() - start
    return seconds


def lloyd(levels: int, numbers: Tensor, weights: Tensor) -> float:
    """Seconds of Lloyd's weighted k-means on raw numbers."""
    start = time.perf_counter()
    centers = numbers.quantile(torch.linspace(0.01, 0.99, levels))
    for _ in range(LLOYD_ITERATIONS):
        labels = torch.bucketize(numbers, (centers[1:] + centers[:-1]) / 2)
        mass = torch.bincount(labels, weights, minlength=levels)
        centers = torch.bincount(labels, weights * numbers, minlength=levels) / mass.clamp(min=1e-12)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipe", default="nuq3-1%")
    arguments = parser.parse_args()
    data = make_input()
    before = peak_bytes()
    seconds = fit_layer(arguments.recipe, data)
    beside = peak_bytes() - before
    total = sum(seconds.values())
    numbers = data[0][0].flatten()[:LLOYD_SAMPLE].float() / 4
    weights = data[0][1].flatten()[:LLOYD_SAMPLE].float().square()
    levels = 2 ** get_recipe(arguments.recipe).keys.code_bits
    whole = 2 * SEQUENCES * TOKENS * HEADS * HEAD_DIM / LLOYD_SAMPLE
    peer = lloyd(levels, numbers, weights) * whole
    result = {
        "recipe": arguments.recipe,
        "threads": torch.get_num_threads(),
        "seconds_keys": seconds["keys"],
        "seconds_values": seconds["values"],
        "seconds": total,
        "bytes_beside_input": beside,
        "seconds_lloyd_extrapolated": peer,
        "ratio": peer / total,
    }
    print(f"fit of one 7B-shaped layer, {arguments.recipe}: keys {seconds['keys']:.2f} s, values {seconds['values']:.2f} s")
    print(f"memory beside the input: {beside / 1e6:.0f} MB")
    print(f"Lloyd's k-means on the raw numbers (extrapolated): {peer:.0f} s, {peer / total:.0f} times as long")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
