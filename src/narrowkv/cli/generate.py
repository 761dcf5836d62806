"""`narrowkv generate`: continue a prompt from a packed cache."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from narrowkv.cli.common import err, find_sources, learns, load_model, note_mix, out, texts_to_learn, windows_to_learn
from narrowkv.cli.options import (
    BackendOption,
    BosOption,
    CalibrationOption,
    CalibrationTextOption,
    DeviceOption,
    DtypeOption,
    LearnedSamplesOption,
    LearnedWindowOption,
    ModelArgument,
    RecipeOption,
    SeedOption,
    TemperatureOption,
)
from narrowkv.defaults import AUTO
from narrowkv.errors import TextError

if TYPE_CHECKING:
    from narrowkv.integrations import PackedCache


def continue_text(
    model: Any,
    tokenizer: Any,
    cache: "PackedCache",
    prompt: str,
    tokens: int,
    temperature: float = 0.0,
    bos: bool | None = None,
) -> str:
    """The continuation of a prompt; raises TextError if the prompt is empty."""
    import torch

    from narrowkv.evaluate.windows import prompt_tokens
    from narrowkv.integrations.versions import CACHE

    prompt_ids = prompt_tokens(tokenizer, prompt, bos).to(model.device)
    if not prompt or prompt_ids.shape[1] == 0:
        raise TextError("The prompt is empty; give at least one word.")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        ids = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            **{CACHE: cache},
            max_new_tokens=tokens,
            pad_token_id=pad,
            **sampling,
        )
    return tokenizer.decode(ids[0, prompt_ids.shape[1] :], skip_special_tokens=True)


def summary(cache: "PackedCache") -> str:
    """One line on the contents and the size of a cache."""
    exact = 2 * cache.elements
    return (
        f"{cache.recipe.name}: {cache.get_seq_length()} tokens in {cache.nbytes:,} bytes ({cache.bits_per_element:.2f} bits "
        f"per "
        f"element, everything counted), {exact / cache.nbytes:.1f} times smaller than 16 bit; attention: {cache.backend}."
    )


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="A file or pipe with the text to continue; - is standard input.")
    ] = None,
    recipe: RecipeOption = None,
    calibration: CalibrationOption = None,
    calibration_text: CalibrationTextOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    window: LearnedWindowOption = None,
    samples: LearnedSamplesOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = AUTO,
    bos: BosOption = None,
) -> None:
    """Continue a prompt with a packed cache."""
    import torch

    from narrowkv.evaluate.sources import read_prompt, read_texts
    from narrowkv.integrations import PackedCache

    if (prompt is None) == (prompt_file is None):
        raise TextError("Give either --prompt TEXT or --prompt-file FILE.")
    text = read_prompt(prompt_file) if prompt_file is not None else prompt or ""
    if not text:
        raise TextError("The prompt is empty; give at least one word.")
    tables = [] if calibration is None else [calibration]
    sources = texts_to_learn(model, calibration_text)
    window, samples = windows_to_learn(sources, window, samples)
    learn_from = read_texts(sources)
    loaded, tokenizer = load_model(model, dtype, device)
    note_mix(model, calibration_text, learns(recipe, tables))
    (source,) = find_sources(loaded, tokenizer, recipe, tables, learn_from, window, samples, backend, bos)
    cache = PackedCache(loaded, source, backend=backend)
    torch.manual_seed(seed)
    out.print(continue_text(loaded, tokenizer, cache, text, max_new_tokens, temperature, bos), markup=False, highlight=False)
    err.print(summary(cache), highlight=False)
