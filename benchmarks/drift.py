"""How far a long generation drifts from the exact cache: `python -m benchmarks.drift MODEL [MODEL ...] --out results/drift`.

The model samples 2,000 tokens behind a prompt of 1,024, once of encyclopedia text and once of source code, with its own cache.
Each recipe reads the same tokens: as in use (`stream`: the prompt attends exactly to itself, then one token after another to
the packed past) and as papers measure (`strict`). Printed is the mean over tokens of KL(exact || quantized) by position, 250
tokens a column. Tables are those of `benchmarks.real_models --calibrations FOLDER`, or learned from the built-in mix anew.
There is one file for each model, which goes on where it was interrupted.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real_models import Subject, load
from benchmarks.tasks.caches import empty
from narrowkv import PackedCache, get_recipe
from narrowkv.evaluate.perplexity import Source
from narrowkv.evaluate.results import ResultFile
from narrowkv.evaluate.windows import cut_windows

KIND = "drift"
RECIPES = ("narrow4", "narrow3", "narrow2", "nuq3-1%", "nuq2-1%", "kivi-2")
PROMPT, NEW_TOKENS, BIN, CHUNK = 1024, 2000, 250, 50
MODES = ("stream", "strict")


@torch.inference_mode()
def generated(subject: Subject, new_tokens: int) -> Tensor:
    """Token ids [2, PROMPT + new_tokens], of which the last were sampled: encyclopedia text, and source code."""
    torch.manual_seed(0)
    windows = [cut_windows(subject.tokenizer, text, PROMPT, 1) for text in subject.scored.values()]
    model: Any = subject.model
    ids: Tensor = model.generate(
        torch.cat(windows),
        attention_mask=torch.ones(2, PROMPT, dtype=torch.int64),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
    )
    return ids


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL(exact || other) of logits [..., vocabulary], in nats."""
    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.inference_mode()
def drift(model: Any, sources: dict[str, Source], mode: str, ids: Tensor) -> dict[str, Tensor]:
    """Of each recipe KL(exact || quantized) [2, new tokens] of every token behind the prompt."""
    caches = {name: PackedCache(model, source, strict=mode == "strict") for name, source in sources.items()}
    exact = empty(model, None)
    found: dict[str, list[Tensor]] = {name: [] for name in sources}
    for part in (ids[:, :PROMPT], *ids[:, PROMPT:-1].split(CHUNK, dim=1)):
        at_once, last = (part.shape[1], 1) if part.shape[1] == PROMPT else (1 if mode == "stream" else CHUNK, 0)
        expected = model(part, past_key_values=exact, use_cache=True, logits_to_keep=last).logits
        for name, cache in caches.items():
            steps = part.split(at_once, dim=1)
            logits = [model(step, past_key_values=cache, use_cache=True, logits_to_keep=last).logits for step in steps]
            found[name].append(divergence(expected, torch.cat(logits, dim=1)))
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}


def run(name: str, options: argparse.Namespace) -> ResultFile:
    """All rows that a model's file lacks."""
    model = Path(name).name
    settings = {"model": model, "dtype": options.dtype, "prompt": PROMPT, "new_tokens": options.new_tokens, "bin": BIN}
    results = ResultFile(options.out / f"{model}.json", KIND, f"python -m benchmarks.drift {model}", settings)
    missing = {mode: [name for name in options.recipes if results.find(recipe=name, mode=mode) is None] for mode in MODES}
    if not any(missing.values()):
        return results
    subject = load(name, dtype=options.dtype)
    wanted = [get_recipe(name) for name in dict.fromkeys(name for names in missing.values() for name in names)]
    sources = subject.tables("mix", wanted, options.calibrations)
    ids = generated(subject, options.new_tokens)
    for mode, names in reversed(missing.items()):
        for recipe, found in drift(subject.model, {name: sources[name] for name in names}, mode, ids).items():
            bins = torch.stack([part.mean(1) for part in found.split(BIN, dim=1)], dim=1).tolist()
            key = {"recipe": recipe, "mode": mode, "mean": found.mean().item()}
            results.add({**key, **dict(zip(subject.scored, bins, strict=True))})
    return results


def show(results: ResultFile) -> None:
    """Print what a file holds."""
    for row in results.rows:
        for text in ("encyclopedia", "code"):
            figures = "  ".join(f"{figure:.4f}" for figure in row[text])
            print(f"{results.path.stem:20} {row['mode']:6} {text:12} {row['recipe']:10} {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of models, or hub ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--calibrations", type=Path, help="folder where tables are stored")
    options = parser.parse_args()
    for name in options.models:
        show(run(name, options))


if __name__ == "__main__":
    main()
