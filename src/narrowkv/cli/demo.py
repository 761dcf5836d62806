"""`narrowkv demo`: the built-in model generates from a packed cache, and a table shows the loss of each recipe."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from narrowkv.cli.common import command_line, err, learn, load_model, out, progress, quality_caption, quality_table
from narrowkv.cli.generate import continue_text, summary
from narrowkv.cli.options import JsonOption
from narrowkv.defaults import DEMO, REFERENCE_TOKENS

if TYPE_CHECKING:
    from narrowkv.calibration import Calibration

RECIPES = (
    "fp16",
    "narrow4",
    "narrow3",
    "narrow2",
    "nuq4-1%",
    "nuq3-1%",
    "nuq2-1%",
    "nuq4",
    "nuq3",
    "nuq2",
    "int4",
    "int3",
    "int2",
)
WINDOW = 2048
FACT = "The password of Matilda is silent harbour."
QUESTION = "The password of Matilda is"
BETWEEN = 2500  # characters of other text between the two


def demo(
    json_file: JsonOption = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text to score.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text to calibrate on.")] = 16,
    recall_distance: Annotated[int, typer.Option(min=128, max=2000)] = 512,
    recall_rows: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Calibrate the built-in model, generate from a packed cache, and compare recipes."""
    from narrowkv.evaluate import cut_windows, measure
    from narrowkv.evaluate.perplexity import at_length
    from narrowkv.evaluate.results import ResultFile
    from narrowkv.evaluate.retrieval import recall_batches
    from narrowkv.evaluate.sources import read_text
    from narrowkv.methods import get_recipe

    model, tokenizer = load_model(DEMO)
    recipes = [get_recipe(name) for name in RECIPES]
    calibrated = learn(
        model, tokenizer, [r for r in recipes if r.needs_calibration], [read_text("narrowkv://train")], WINDOW, samples
    )
    learned = {calibration.recipe.name: calibration for calibration in calibrated}
    sources: list = [learned.get(recipe.name, recipe) for recipe in recipes]
    text = read_text("narrowkv://held-out")
    speak(model, tokenizer, learned["narrow3"], text)
    recall = recall_batches(tokenizer, text, recall_distance, recall_rows)
    with progress("measuring") as advance:
        scored = cut_windows(tokenizer, text, WINDOW, windows)
        rows = measure(model, sources, scored, recall, on_step=advance)
    with progress("filling caches") as advance:
        for i, source in enumerate(sources):
            rows[i] = at_length(rows[i], model, source, scored[:1], REFERENCE_TOKENS)
            advance(i + 1, len(sources))
    out.print(quality_table(rows, "The built-in model, on text it was not trained on"))
    recalled = f"recall: facts and passages met {recall_distance} tokens earlier."
    counted = f"Bits and kB: of a cache of {REFERENCE_TOKENS:,} tokens."
    out.print(f"{quality_caption(rows)}\n{recalled} {counted}", highlight=False)
    if json_file is not None:
        json_file.unlink(missing_ok=True)  # all is measured anew
        settings = {"model": DEMO, "windows": windows, "samples": samples, "recall_distance": recall_distance}
        results = ResultFile(json_file, "demo", command_line(), settings | {"recall_rows": recall_rows})
        for row in rows:
            results.add(row.to_dict())


def speak(model: Any, tokenizer: Any, calibration: "Calibration", text: str) -> None:
    """State a fact, let the model read other text, query the fact, and print the size of its packed cache."""
    from narrowkv.integrations import PackedCache

    cache = PackedCache(model, calibration)
    prompt = f"{FACT}\n\n{text[:BETWEEN]}\n\n{QUESTION}"
    words = continue_text(model, tokenizer, cache, prompt, 8).split(".")[0] + "."
    out.print(f"Given: {FACT}", highlight=False)
    out.print(f"Asked, {cache.get_seq_length()} tokens later: {QUESTION}[bold]{escape(words)}[/bold]", highlight=False)
    err.print(summary(cache) + "\n", highlight=False)
