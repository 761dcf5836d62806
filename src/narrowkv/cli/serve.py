"""`narrowkv serve`: an OpenAI-compatible server over packed caches."""

from pathlib import Path
from typing import Annotated

import typer

from narrowkv.cli.common import find_sources, learns, load_model, note, note_mix, texts_to_learn, windows_to_learn
from narrowkv.cli.options import (
    BackendOption,
    CalibrationOption,
    CalibrationTextOption,
    DeviceOption,
    DtypeOption,
    LearnedSamplesOption,
    LearnedWindowOption,
    ModelArgument,
    RecipeOption,
)
from narrowkv.defaults import AUTO
from narrowkv.errors import MissingPackageError, TextError

KEYS = "NARROWKV_API_KEY"


def serve(
    model: ModelArgument,
    calibration: CalibrationOption = None,
    recipe: RecipeOption = None,
    calibration_text: CalibrationTextOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is open to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in requests.", show_default="MODEL")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key that requests must send; repeat for several.", envvar=KEYS, show_envvar=True)
    ] = None,
    rows: Annotated[int, typer.Option(min=1, max=256, help="Answers decoded at a time.")] = 8,
    chunk: Annotated[
        int, typer.Option(min=64, help="Tokens of a prompt read between two steps, a multiple of 64; prefixes end there too.")
    ] = 128,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused with 429.")] = 64,
    cache_bytes: Annotated[int, typer.Option(min=0, help="Memory of stored prefixes; 0: none are stored.")] = 2**30,
    prefix_dir: Annotated[Path | None, typer.Option(help="Folder in which prefixes stay over a restart.")] = None,
    prefix_scope: Annotated[str, typer.Option(help="Who shares prefixes: all, or key (each API key has its own).")] = "all",
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Most bytes of a request.")] = 2**20,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a prompt.", show_default="the model's positions")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 4096,
    stop_seconds: Annotated[int, typer.Option(min=0, help="That answers under way are given when the server stops.")] = 30,
    window: LearnedWindowOption = None,
    samples: LearnedSamplesOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
) -> None:
    """Serve a model by OpenAI's API, with continuous batching and prefixes shared between requests."""
    try:
        from narrowkv.serve.app import Settings, make_app
        from narrowkv.serve.gate import Keys
        from narrowkv.serve.listen import Address, hosts_of, listen
    except ImportError as error:
        raise MissingPackageError(f"The server needs {error.name}; pip install 'narrowkv[serve]'.") from error
    from narrowkv.evaluate.sources import read_texts
    from narrowkv.serve.engine import Engine, Limits
    from narrowkv.serve.prompts import Prompts

    if chunk % 64 or prefix_scope not in ("all", "key"):
        raise TextError("--chunk is a multiple of 64, and --prefix-scope is all or key; correct them.")
    keys = [key for given in api_key or () for key in given.split()]
    if prefix_scope == "key" and not keys:
        raise TextError("--prefix-scope key needs keys to tell callers apart; give each one with --api-key.")
    tables = [] if calibration is None else [calibration]
    sources = texts_to_learn(model, calibration_text)
    window, samples = windows_to_learn(sources, window, samples)
    learn_from = read_texts(sources)
    with listen(Address(host, port, stop_seconds)) as listening:
        loaded, tokenizer = load_model(model, dtype, device)
        note_mix(model, calibration_text, learns(recipe, tables))
        (source,) = find_sources(loaded, tokenizer, recipe, tables, learn_from, window, samples, backend)
        limits = Limits(rows, chunk, queue, cache_bytes)
        engine = Engine(loaded, tokenizer, source, limits, prefix_dir, backend=backend)
        settings = Settings(name or model, max_body_bytes, max_new_tokens)
        prompts = Prompts(loaded, tokenizer, max_prompt_tokens)
        app = make_app(engine, prompts, settings, Keys(keys, prefix_scope == "key"), hosts_of(host))
        if not keys and not hosts_of(host):
            note("Anybody who reaches this address may use the server; require a key with --api-key.")
        note(f"{settings.name} with {engine.empty.recipe.name} on {engine.empty.backend}: {listening.url}")
        listening.serve(app)
