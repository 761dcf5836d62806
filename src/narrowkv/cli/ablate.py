"""`narrowkv ablate`: what each part of the method contributes on a model."""

from dataclasses import asdict
from typing import Annotated

import typer

from narrowkv.cli.common import (
    command_line,
    listed,
    load_model,
    named,
    note_mix,
    progress,
    read_calibrations,
    show_sections,
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
    WindowOption,
)
from narrowkv.defaults import ABLATIONS, AUTO, REFERENCE_TOKENS
from narrowkv.errors import RecipeError, TextError


def ablate(
    model: ModelArgument,
    out: FolderOption,
    ablations: Annotated[str, typer.Option(help="Ablations to run, separated by commas.")] = ",".join(ABLATIONS),
    bits: Annotated[str, typer.Option(help="Widths in bits, separated by commas.")] = "4,3,2",
    calibration: CalibrationsOption = None,
    text: ScoredTextOption = None,
    calibration_text: CalibrationTextOption = None,
    other_text: Annotated[
        list[str] | None, typer.Option(help="Another text to calibrate on, for the ablation `texts`.")
    ] = None,
    window: WindowOption = 512,
    limit: Annotated[int, typer.Option(min=1, help="Number of windows to score at most.")] = 4,
    samples: SamplesOption = 16,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the cache whose bits are counted.")] = REFERENCE_TOKENS,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
    bos: BosOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the random tokens in the ablation `texts`.")] = 0,
) -> None:
    """Run KVQuant's ablations on a model: what each part of the method contributes, with a table and a plot for each."""
    from narrowkv.evaluate import ablate as ablating
    from narrowkv.evaluate.results import ResultFile, read_result
    from narrowkv.evaluate.sources import read_text, read_texts
    from narrowkv.report.ablate import sections

    finished = read_calibrations(calibration)
    scored = texts_to_score(model, text)
    if not scored:
        raise TextError("An ablation needs a text; give one with --text FILE.")
    learned = texts_to_learn(model, calibration_text)
    options = ablating.AblateOptions(_widths(bits), window, limit, samples, context, backend, bos)
    settings = {"model": model, "dtype": dtype, "device": device, "text": named(scored), "calibration_text": named(learned)}
    path = out / f"{ablating.KIND}.json"
    results = ResultFile(path, ablating.KIND, command_line(), settings | asdict(options) | {"bits": list(options.bits)}, seed)
    words, learn_from = read_texts(scored), read_texts(learned)
    others = {name: read_text(name) for name in other_text or ()}
    loaded, tokenizer = load_model(model, dtype, device)
    note_mix(model, calibration_text)
    with progress("climbing") as advance:
        ablating.ablate(loaded, tokenizer, listed(ablations), words, learn_from, options, results, advance, others, finished)
    show_sections(sections(read_result(path)), out, ablating.KIND)


def _widths(bits: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in bits.split(","))
    except ValueError as error:
        raise RecipeError(f"--bits takes widths such as 4,3,2, not {bits!r}.") from error
