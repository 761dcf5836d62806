"""The intrinsic-value codec's options on a real model: `python -m benchmarks.intrinsic MODEL --out results/intrinsic`.

Sliding-window statistics are `-wN`: levels over a block and the N - 1 after it, which stay exact for as long. Granularity is
the tokens of a block, which has four levels for each head: 64 in the recipe, fewer here, and adaptive, where calibration
chooses for the keys and the values of each layer under a budget of as many bits as blocks of 16 tokens take everywhere. It
learns from the built-in mix. All are scored as in `benchmarks.real_models`; bits are those of a cache of one window, tokens
that are still exact included. A file goes on where it was interrupted.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.real_models import SPREAD, WINDOW, Subject, load
from narrowkv import Calibration, calibrate_many, get_recipe
from narrowkv.codec import Scheme
from narrowkv.evaluate.perplexity import Source, measure
from narrowkv.evaluate.results import ResultFile, definition
from narrowkv.evaluate.windows import cut_windows
from narrowkv.methods import Recipe
from narrowkv.methods.recipe import SearchSpace

KIND = "intrinsic"
NEAREST = "intrinsic-2-nearest"
PUBLISHED = ("intrinsic-2", "intrinsic-2-w2", "intrinsic-2-w4", "intrinsic-2-kmeans")
OURS = (NEAREST, f"{NEAREST}-w2", f"{NEAREST}-w4", f"{NEAREST}-kmeans", f"{NEAREST}-kmeans-w4")
BLOCKS, MIDDLE = (32, 16, 8), 16  # tokens
LEVEL_BITS = 4 * 16  # of a block and head
FIGURES = ("bits_per_element", "kld_strict", "perplexity_strict", "perplexity_fp", "tokens")
SAMPLES = 8  # windows of 512 tokens that the adaptive recipe learns from


def of_blocks(tokens: int) -> Scheme:
    """Nearest levels, by k-means, of blocks of so many tokens."""
    scheme = get_recipe(f"{NEAREST}-kmeans").keys
    return replace(scheme, quantization=replace(scheme.quantization, group_size=tokens))


def recipes(head_dim: int) -> Iterator[Recipe]:
    """All that are measured, the adaptive one last; head_dim: of the model's heads."""
    yield from map(get_recipe, (*PUBLISHED, *OURS))
    for tokens in BLOCKS:
        yield Recipe(f"{NEAREST}-kmeans, blocks of {tokens}", of_blocks(tokens), of_blocks(tokens))
    choices = tuple(of_blocks(tokens) for tokens in (64, *BLOCKS))
    budget = 2 + LEVEL_BITS / (MIDDLE * head_dim) + 0.001  # positions, and parts of blocks
    yield Recipe(f"{NEAREST}-kmeans, adaptive", choices[0], choices[0], search_space=SearchSpace(budget, choices, choices))


def calibrated(subject: Subject, recipe: Recipe, folder: Path) -> Source:
    """A recipe, with what it chooses for this model, read from a folder if that was stored there."""
    if not recipe.needs_calibration:
        return recipe
    if not folder.exists():
        text, _ = subject.learned["mix"]
        batches = cut_windows(subject.tokenizer, text, WINDOW, SAMPLES).split(1)
        calibrate_many(subject.model, batches, [recipe])[0].save_pretrained(folder)
    return Calibration.from_pretrained(folder, subject.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a hub id")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("--windows", type=int, default=1, help="scored of each text")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    name = Path(options.model).name
    settings = {"model": name, "window": options.window, "windows": options.windows, "dtype": options.dtype}
    results = ResultFile(options.out / f"{name}.json", KIND, f"python -m benchmarks.intrinsic {name}", settings)
    subject = load(options.model, dtype=options.dtype)
    config = subject.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for recipe in recipes(head_dim):
        for text, words in subject.scored.items():
            if results.find(recipe=recipe.name, text=text) is not None:
                continue
            source = calibrated(subject, recipe, options.out / f"{name}-adaptive")
            windows = cut_windows(subject.tokenizer, words, options.window, options.windows, spread=SPREAD)
            (quality,) = measure(subject.model, [source], windows, stream_chunk=None)
            figures = {name: getattr(quality, name) for name in FIGURES}
            results.add({"recipe": recipe.name, "text": text, "definition": definition(recipe)} | figures)
            print(recipe.name, text, f"{quality.bits_per_element:.3f} {quality.kld_strict:.4f}", flush=True)


if __name__ == "__main__":
    main()
