"""Make ready tables for the models of tools/zoo.yaml: `python tools/zoo.py --out zoo`, which goes on where it was interrupted.

For each model and recipe: a folder with the calibration and a model card that has bits, KL divergence, the texts and their
license. `--push OWNER` uploads each folder to the hub as OWNER/<model>-<recipe>; a token comes from `hf auth login`.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

import narrowkv
from narrowkv import hub
from narrowkv.errors import NarrowKVError
from narrowkv.evaluate.perplexity import measure
from narrowkv.evaluate.results import ResultFile
from narrowkv.evaluate.sources import read_texts
from narrowkv.evaluate.windows import cut_apart
from narrowkv.files import write_json

LIST = Path(__file__).with_name("zoo.yaml")
TEXTS = {"narrowkv://mix": "Apache-2.0 (written for NarrowKV)"}
CARD = """---
library_name: narrowkv
base_model: {id}
license: apache-2.0
tags: [kv-cache, quantization, narrowkv]
---

# {recipe} tables for {id}

Tables with which [NarrowKV](https://github.com/narrowkv/narrowkv) stores the keys and values of this model in
{bits:.2f} bits per element, everything counted, in a cache of {window:,} tokens. They contain no weights.

```python
import narrowkv

model, tokenizer = narrowkv.load_model("{id}")
cache = narrowkv.PackedCache(model, narrowkv.Calibration.from_pretrained("{repository}"))
```

| bits | KLD (nats per token) | perplexity | unquantized | top-1 |
|---|---|---|---|---|
| {bits:.2f} | {kld:.4f} | {perplexity:.2f} | {exact:.2f} | {top1:.1%} |

Strict, on {tokens:,} tokens of the texts below that were not used for calibration.

- **Calibrated on** {learned:,} tokens of {texts}.
- **License of the texts**: {texts_license}. **License of the model**: {license}. **License of these tables**: Apache-2.0.
- **Made by** NarrowKV {version}. {note}
"""


def read_list(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Recipes and models of a list: each model has an id and the license of its weights, perhaps a note."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found["recipes"], found["models"]


def folder_name(model: str, recipe: str) -> str:
    """The folder, and the repository, of a model's tables: the last part of its id, and the recipe."""
    return f"{model.rstrip('/').rsplit('/', 1)[-1]}-{recipe}"


def make(model: dict[str, Any], recipes: list[str], out: Path, results: ResultFile, settings: dict[str, Any]) -> None:
    """Calibrate a model for the recipes that it has no tables for yet, and write tables, cards and rows of results."""
    missing = [recipe for recipe in recipes if not results.find(model=model["id"], recipe=recipe)]
    if not missing:
        return
    loaded, tokenizer = narrowkv.load_model(model["id"], settings["dtype"], settings["device"])
    texts = read_texts(TEXTS)
    learned, scored = cut_apart(tokenizer, texts, settings["window"], settings["samples"], settings["scored"])
    chosen = [narrowkv.get_recipe(recipe) for recipe in missing]
    calibrations = narrowkv.calibrate_many(loaded, learned.split(1), chosen)
    for calibration, quality in zip(calibrations, measure(loaded, calibrations, scored, stream_chunk=None), strict=True):
        folder = out / folder_name(model["id"], calibration.recipe.name)
        calibration.save_pretrained(folder)
        row = {"model": model["id"], **asdict(quality), "learned": calibration.provenance["tokens"]}
        (folder / "README.md").write_text(card(model, row, settings["owner"]), encoding="utf-8")
        results.add({name: found for name, found in row.items() if found == found})  # NaN is no JSON


def card(model: dict[str, Any], row: dict[str, Any], owner: str | None) -> str:
    """The model card of one calibration."""
    name = folder_name(model["id"], row["recipe"])
    return CARD.format(
        id=model["id"],
        recipe=row["recipe"],
        repository=f"{owner}/{name}" if owner else name,
        bits=row["bits_per_element"],
        kld=row["kld_strict"],
        perplexity=row["perplexity_strict"],
        exact=row["perplexity_fp"],
        top1=row["top1"],
        tokens=row["tokens"],
        window=row["window"],
        learned=row["learned"],
        texts=", ".join(TEXTS),
        texts_license=", ".join(TEXTS.values()),
        license=model["license"],
        version=narrowkv.__version__,
        note=f"Note: {model['note']}." if "note" in model else "",
    )


def push(model: dict[str, Any], recipes: list[str], out: Path, owner: str) -> None:
    """Upload the folders of a model that were not uploaded yet; `pushed.json` in the folder says that one was."""
    for recipe in recipes:
        folder = out / folder_name(model["id"], recipe)
        done = out / f"{folder.name}.pushed.json"
        if folder.exists() and not done.exists():
            address = hub.upload(f"{owner}/{folder.name}", str(folder), f"NarrowKV calibration {recipe}")
            write_json(done, {"address": address})


def main(arguments: list[str] | None = None) -> int:
    """Go through the list; a model that fails is named at the end, and the next one is tried. Returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", type=Path, default=LIST)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="models whose id contains this")
    parser.add_argument("--push", metavar="OWNER")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for option, default in {"window": 512, "samples": 32, "scored": 8}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    recipes, models = read_list(given.list)
    settings = {name: getattr(given, name) for name in ("window", "samples", "scored", "dtype", "device")}
    settings["texts"] = [*TEXTS]
    results = ResultFile(given.out / "zoo.json", "zoo", f"python tools/zoo.py --out {given.out.name}", settings)
    failed = {}
    for model in (model for model in models if (given.only or "") in model["id"]):
        try:
            make(model, recipes, given.out, results, settings | {"owner": given.push})
            if given.push:
                push(model, recipes, given.out, given.push)
        except NarrowKVError as error:
            failed[model["id"]] = str(error)
    for name, reason in failed.items():
        print(f"{name}: {reason}")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
