"""`narrowkv eval`: what recipes cost on a model and a text."""

from typing import Annotated

import typer
from rich.markup import escape

from narrowkv.cli.common import (
    BackendOption,
    CalibrationOption,
    CalibrationTextOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    RecipeOption,
    SamplesOption,
    WindowOption,
    default_text,
    find_source,
    load_model,
    out,
    progress,
    quality_caption,
    quality_table,
)
from narrowkv.defaults import AUTO, DENSE, REFERENCE_TOKENS, STREAM_CHUNK
from narrowkv.errors import TextError
from narrowkv.files import write_json


def evaluate(
    model: ModelArgument,
    recipe: RecipeOption = None,
    calibration: CalibrationOption = None,
    calibration_text: CalibrationTextOption = None,
    text: Annotated[str | None, typer.Option(help="Text to score: a file or a data set's name.")] = None,
    window: WindowOption = 2048,
    samples: SamplesOption = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Score at most this many windows.")] = None,
    stream_chunk: Annotated[int, typer.Option(min=1, help="Tokens per chunk when streaming.")] = STREAM_CHUNK,
    recall_distance: Annotated[int, typer.Option(min=0, help="Also test recall over this many tokens; 0 does not.")] = 0,
    recall_rows: Annotated[int, typer.Option(min=1)] = 32,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
    json_file: JsonOption = None,
) -> None:
    """Measure bits, bytes, perplexity (strict and stream), divergence and recall of a recipe or calibration."""
    from narrowkv.evaluate import cut_windows, measure
    from narrowkv.evaluate.quality import bits_at
    from narrowkv.evaluate.recall import recall_batches
    from narrowkv.evaluate.sources import read_text

    source_text = default_text(model, text, "narrowkv://held-out")
    if source_text is None:
        raise TextError("Evaluation needs a text; give one with --text FILE.")
    words = read_text(source_text)
    loaded, tokenizer = load_model(model, dtype, device)
    windows = cut_windows(tokenizer, words, window, limit)
    learned_from = default_text(model, calibration_text, "narrowkv://train")
    source = find_source(loaded, tokenizer, recipe, calibration, learned_from, window, samples, backend)
    batches = recall_batches(tokenizer, words, recall_distance, recall_rows)
    with progress("measuring") as advance:
        rows = measure(loaded, [source], windows, batches, stream_chunk=stream_chunk, backend=backend, on_step=advance)
    out.print(quality_table(rows, escape(f"{model} on {source_text}")))
    bits = bits_at(loaded, source, windows[:1], REFERENCE_TOKENS) if backend != DENSE else None
    long = (
        ""
        if bits is None
        else f"\nA cache of {REFERENCE_TOKENS:,} tokens takes {bits:.3f} bits a number: tables weigh less the longer it is."
    )
    out.print(quality_caption(rows) + long, highlight=False)
    if json_file is not None:
        write_json(json_file, [row.to_dict() for row in rows])
