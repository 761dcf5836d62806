"""What calibrating takes in time and memory: `python -m benchmarks.calibrate [--json FILE]`.

First all of it for the built-in model, by stage: the pass that finds ranges, the pass with gradients that fills histograms and
samples, and the codebooks. Then the fit alone of one layer of a 7-billion-parameter model: 32,768 tokens x 4,096 channels of
keys and of values, 16 sequences, statistics and codebooks. The peer in the same run is what the published code's method costs:
Lloyd's k-means over the raw normalized elements, here on a sample and scaled up to all of them. Peak memory is the growth of
the process besides model and text, or besides the layer's elements (Linux).
"""

import argparse
import ctypes
import gc
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import narrowkv
from benchmarks.running import write
from narrowkv import get_recipe
from narrowkv.calibration import Fit
from narrowkv.evaluate import cut_windows
from narrowkv.evaluate.sources import read_text

STAGES = ("ranges", "gradients", "codebooks")
HEADS, HEAD_DIM, TOKENS, SEQUENCES = 32, 128, 2048, 16
LLOYD_SAMPLE, LLOYD_ITERATIONS = 2**20, 50


def reset_peak() -> None:
    """Forget how large this process once was."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest resident size of this process since the last reset."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch:
    """Seconds and peak bytes from one `lap` to the next."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before counts as free
        reset_peak()
        self.before, self.started = peak_bytes(), time.perf_counter()
        self.seconds: list[float] = []
        self.extra_bytes: list[int] = []

    def lap(self) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.extra_bytes.append(peak_bytes() - self.before)
        reset_peak()
        self.started = time.perf_counter()

    def found(self, names: Sequence[str]) -> dict[str, float]:
        """What was measured: of everything, and of each lap by its name."""
        found: dict[str, float] = {"seconds": sum(self.seconds), "extra_bytes": max(self.extra_bytes)}
        for name, seconds, peak in zip(names, self.seconds, self.extra_bytes, strict=True):
            found |= {f"seconds_{name}": seconds, f"extra_bytes_{name}": peak}
        return found


def whole(model: PreTrainedModel, batches: Sequence[Tensor], recipe: str) -> dict[str, float]:
    """Seconds, and bytes besides model and text, of calibrating a model, and of each stage of it."""
    watch = Watch()

    def on_batch(done: int, total: int) -> None:
        if done in (total // 2, total):  # both passes read every batch
            watch.lap()

    narrowkv.calibrate(model, batches, recipe, on_batch=on_batch)
    watch.lap()
    return watch.found(STAGES)


def make_input() -> list[tuple[Tensor, Tensor]]:
    """Elements with outlier channels, and gradients of a heavy-tailed size: [tokens, heads, head_dim] float16 each."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(HEADS, HEAD_DIM, generator=generator).square() * 4 + 0.1
    shape = (TOKENS, HEADS, HEAD_DIM)
    pairs = []
    for _ in range(SEQUENCES):
        elements = torch.randn(shape, generator=generator) * spread
        gradient = torch.randn(shape, generator=generator) * torch.rand(TOKENS, 1, 1, generator=generator)
        pairs.append((elements.half(), gradient.half()))
    return pairs


def fit_layer(recipe_name: str, data: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Seconds for the keys and for the values of one layer, and bytes besides the input."""
    recipe, watch = get_recipe(recipe_name), Watch()
    for scheme in (recipe.keys, recipe.values):
        fit = Fit(scheme)
        for elements, _ in data:
            fit.observe_range(elements)
        for elements, gradient in data:
            fit.observe_codebook(elements, gradient)
        fit.quantizer((HEADS, HEAD_DIM), scheme)
        watch.lap()
    return watch.found(("keys", "values"))


def lloyd(levels: int, data: list[tuple[Tensor, Tensor]]) -> float:
    """Seconds of Lloyd's weighted k-means on raw elements, of all of them as a sample tells."""
    elements = data[0][0].flatten()[:LLOYD_SAMPLE].float() / 4
    weights = data[0][1].flatten()[:LLOYD_SAMPLE].float().square()
    start = time.perf_counter()
    centers = elements.quantile(torch.linspace(0.01, 0.99, levels))
    for _ in range(LLOYD_ITERATIONS):
        labels = torch.bucketize(elements, (centers[1:] + centers[:-1]) / 2)
        mass = torch.bincount(labels, weights, minlength=levels)
        centers = torch.bincount(labels, weights * elements, minlength=levels) / mass.clamp(min=1e-12)
    return (time.perf_counter() - start) * 2 * SEQUENCES * TOKENS * HEADS * HEAD_DIM / LLOYD_SAMPLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipes", nargs="*", default=["nuq3-1%", "narrow3"], help="for the built-in model")
    parser.add_argument("--samples", type=int, default=16, help="windows of text that it reads")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--layer-recipes", nargs="*", default=["nuq3-1%"], help="for the 7B-shaped layer")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    model, tokenizer = narrowkv.load_model("narrowkv://demo")
    batches = cut_windows(tokenizer, read_text("narrowkv://train"), arguments.window, arguments.samples).split(1)
    tokens = sum(batch.numel() for batch in batches)
    for name in arguments.recipes:
        found = whole(model, batches, name)
        rows.append({"of": "built-in model", "recipe": name, "tokens": tokens, **found})
        parts = ", ".join(f"{stage} {found[f'seconds_{stage}']:.2f}" for stage in STAGES)
        print(f"built-in model, {tokens} tokens, {name}: {found['seconds']:.2f} s ({parts}), ", end="")
        print(f"{found['extra_bytes'] / 1e6:.0f} MB besides model and text", flush=True)
    data = make_input() if arguments.layer_recipes else []
    for name in arguments.layer_recipes:
        found = fit_layer(name, data)
        rows.append({"of": "7B-shaped layer", "recipe": name, "tokens": SEQUENCES * TOKENS, **found})
        print(f"fit of one 7B-shaped layer, {name}: {found['seconds']:.2f} s (keys {found['seconds_keys']:.2f}, ", end="")
        print(f"values {found['seconds_values']:.2f}), {found['extra_bytes'] / 1e6:.0f} MB besides the input", flush=True)
        peer = lloyd(2 ** get_recipe(name).keys.code_bits, data)
        rows[-1] |= {"seconds_lloyd_extrapolated": peer, "ratio": peer / found["seconds"]}
        print(f"Lloyd's k-means on raw elements (extrapolated): {peer:.0f} s, {peer / found['seconds']:.0f} times as long")
    write(arguments.json, rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
