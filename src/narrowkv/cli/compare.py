"""`narrowkv compare`: recipes side by side on one model and text."""

from dataclasses import asdict
from typing import Annotated

import typer

from narrowkv.cli.common import (
    command_line,
    load_model,
    named,
    note_mix,
    progress,
    read_calibrations,
    recipes_for,
    show_sections,
    still_learn,
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
    FolderOption,
    ModelArgument,
    SamplesOption,
    ScoredTextOption,
    SpreadOption,
    WindowOption,
)
from narrowkv.defaults import AUTO, REFERENCE_TOKENS, STREAM_CHUNK
from narrowkv.errors import TextError

RECIPES = "narrow4,narrow3,narrow2,nuq4-1%,nuq3-1%,nuq2-1%,kivi-4,kivi-2,int4,int3"


def compare(
    model: ModelArgument,
    out: FolderOption,
    recipes: Annotated[
        str | None, typer.Option(help="Names of recipes or JSON files, separated by commas.", show_default=RECIPES)
    ] = None,
    calibration: CalibrationsOption = None,
    text: ScoredTextOption = None,
    calibration_text: CalibrationTextOption = None,
    window: WindowOption = 2048,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of windows to score at most.")] = None,
    spread: SpreadOption = None,
    bos: BosOption = None,
    samples: SamplesOption = 16,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of the cache whose bytes are counted and whose decoding is timed.")
    ] = REFERENCE_TOKENS,
    decode_steps: Annotated[int, typer.Option(min=0, help="Tokens to time; 0 skips timing.")] = 16,
    stream_chunk: Annotated[int, typer.Option(min=1, help="Tokens per chunk in stream mode.")] = STREAM_CHUNK,
    recall_distance: Annotated[int, typer.Option(min=0, help="Tokens over which recall is tested; 0 skips it.")] = 512,
    recall_rows: Annotated[int, typer.Option(min=1)] = 32,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the recall rows.")] = 0,
) -> None:
    """Compare recipes: bits, bytes, perplexity, divergence, top-1 agreement, recall and time; a table and a plot."""
    from narrowkv.evaluate import compare as comparing
    from narrowkv.evaluate.results import ResultFile, read_result
    from narrowkv.evaluate.sources import read_texts
    from narrowkv.report.compare import sections

    finished = read_calibrations(calibration)
    chosen = recipes_for(recipes, finished, RECIPES)
    scored = texts_to_score(model, text)
    if not scored:
        raise TextError("A comparison needs a text; give one with --text FILE.")
    learned = texts_to_learn(model, calibration_text)
    options = comparing.CompareOptions(
        window, limit, samples, context, decode_steps, stream_chunk, recall_distance, recall_rows, backend, spread, bos
    )
    settings = {
        "model": model,
        "dtype": dtype,
        "device": device,
        "text": named(scored),
        "calibration_text": named(learned),
        **asdict(options),
    }
    path = out / f"{comparing.KIND}.json"
    results = ResultFile(path, comparing.KIND, command_line(), settings, seed)
    words, learn_from = read_texts(scored), read_texts(learned)
    loaded, tokenizer = load_model(model, dtype, device)
    note_mix(model, calibration_text, still_learn(chosen, finished))
    with progress("comparing") as advance:
        comparing.compare(loaded, tokenizer, chosen, words, learn_from, options, results, advance, finished)
    show_sections(sections(read_result(path)), out, comparing.KIND)
