"""`narrowkv eval`: the loss of recipes on a model and a text."""

from typing import Annotated

import typer
from rich.markup import escape

from narrowkv.cli.common import (
    find_sources,
    learns,
    load_model,
    named,
    note_mix,
    out,
    progress,
    quality_caption,
    quality_table,
    texts_to_learn,
    texts_to_score,
)
from narrowkv.cli.options import (
    BackendOption,
    BosOption,
    CalibrationsOption,
    CalibrationTextOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    RecipeOption,
    SamplesOption,
    ScoredTextOption,
    SpreadOption,
    WindowOption,
)
from narrowkv.defaults import AUTO, DENSE, REFERENCE_TOKENS, STREAM_CHUNK
from narrowkv.errors import TextError
from narrowkv.files import write_json


def evaluate(
    model: ModelArgument,
    recipe: RecipeOption = None,
    calibration: CalibrationsOption = None,
    calibration_text: CalibrationTextOption = None,
    text: ScoredTextOption = None,
    window: WindowOption = 2048,
    samples: SamplesOption = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of windows to score at most.")] = None,
    spread: SpreadOption = None,
    bos: BosOption = None,
    stream_chunk: Annotated[int, typer.Option(min=1, help="Tokens per chunk in stream mode.")] = STREAM_CHUNK,
    recall_distance: Annotated[int, typer.Option(min=0, help="Tokens over which recall is tested; 0 skips it.")] = 0,
    recall_rows: Annotated[int, typer.Option(min=1)] = 32,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
    json_file: JsonOption = None,
) -> None:
    """Measure bits, bytes, perplexity (strict and stream), divergence and recall of a recipe or of calibrations."""
    from narrowkv.evaluate import cut_windows, measure
    from narrowkv.evaluate.perplexity import bits_at
    from narrowkv.evaluate.retrieval import recall_batches
    from narrowkv.evaluate.sources import read_texts

    scored = texts_to_score(model, text)
    if not scored:
        raise TextError("Evaluation needs a text; give one with --text FILE.")
    learned = texts_to_learn(model, calibration_text)
    words, learn_from = read_texts(scored), read_texts(learned)
    loaded, tokenizer = load_model(model, dtype, device)
    note_mix(model, calibration_text, learns(recipe, calibration or ()))
    windows = cut_windows(tokenizer, words, window, limit, spread=spread, bos=bos)
    batches = recall_batches(tokenizer, words, recall_distance, recall_rows, bos=bos)
    sources = find_sources(loaded, tokenizer, recipe, calibration or (), learn_from, window, samples, backend, bos)
    with progress("measuring") as advance:
        rows = measure(loaded, sources, windows, batches, stream_chunk=stream_chunk, backend=backend, on_step=advance)
    out.print(quality_table(rows, escape(f"{model} on {named(scored)}")))
    out.print(quality_caption(rows), highlight=False)
    for row, source in zip(rows, sources if backend != DENSE else (), strict=False):
        bits = bits_at(loaded, source, windows[:1], REFERENCE_TOKENS)
        long = f"A cache of {REFERENCE_TOKENS:,} tokens takes {bits:.3f} bits per element: tables weigh less the longer it is."
        out.print(f"{row.recipe}: {long}" if len(rows) > 1 else long, highlight=False)
    if json_file is not None:
        write_json(json_file, [row.to_dict() for row in rows])
