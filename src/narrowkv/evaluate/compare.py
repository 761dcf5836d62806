"""What recipes cost on one model and one text: a row of metrics for each, written as soon as it is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv.attention import AUTO
from narrowkv.calibration import Calibration
from narrowkv.defaults import REFERENCE_TOKENS, STREAM_CHUNK
from narrowkv.evaluate.decoding import decoding, filled_dynamic, nbytes_of
from narrowkv.evaluate.finished import finished_for, require_text, tables_checksum
from narrowkv.evaluate.perplexity import Source, filled, measure, with_bytes_of
from narrowkv.evaluate.progress import OnStep, Progress
from narrowkv.evaluate.results import ResultFile, definition
from narrowkv.evaluate.retrieval import RecallBatch, recall_batches
from narrowkv.evaluate.windows import Text, cut_windows
from narrowkv.integrations import calibrate_many
from narrowkv.methods import Recipe, get_recipe

KIND = "compare"
DYNAMIC = "DynamicCache"  # the row of transformers' own cache, for its bytes and its time


@dataclass(frozen=True)
class CompareOptions:
    """Settings of the metrics, besides model, texts and recipes.

    window: tokens per sequence. limit: windows scored at most. samples: sequences to calibrate on. context: tokens of the
    cache whose bytes are counted and over which tokens are decoded. decode_steps: tokens timed; 0 times none. stream_chunk:
    tokens per chunk when streaming. recall_distance: tokens over which recall is tested, 0 for not; recall_rows: of each kind.
    backend: of the caches. spread: windows of which the first `limit` are scored, bos: what windows begin with; both like
    those of `cut_windows`.
    """

    window: int = 2048
    limit: int | None = None
    samples: int = 16
    context: int = REFERENCE_TOKENS
    decode_steps: int = 16
    stream_chunk: int = STREAM_CHUNK
    recall_distance: int = 512
    recall_rows: int = 32
    backend: str = AUTO
    spread: int | None = None
    bos: bool | None = None


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    recipes: Sequence[str | Recipe],
    text: Text,
    learn_from: Text | None,
    options: CompareOptions,
    results: ResultFile,
    on_step: OnStep | None = None,
    calibrations: Sequence[Calibration] = (),
) -> None:
    """Measure those recipes that `results` has no row of yet.

    text: to score. learn_from: the text from which recipes that need it learn, all in one pass; several texts have their share
    of windows each. calibrations: finished ones, whose recipes learn nothing. Raises TextError where a text is missing or too
    short, OutputError where the file has another recipe of the same name, or one of other tables, and CalibrationError where
    a calibration fits neither model nor recipes.
    """
    chosen = [get_recipe(recipe) for recipe in recipes]
    finished = finished_for(model, chosen, calibrations)
    tables = {name: tables_checksum(calibration) for name, calibration in finished.items()}
    missing = [recipe for recipe in chosen if results.find_recipe(recipe.name, recipe, tables.get(recipe.name)) is None]
    learning = [recipe for recipe in missing if recipe.needs_calibration and recipe.name not in finished]
    require_text(learning, learn_from)
    windows = cut_windows(tokenizer, text, options.window, options.limit, spread=options.spread, bos=options.bos)
    recall = recall_batches(tokenizer, text, options.recall_distance, options.recall_rows, results.seed, options.bos)
    batches: Sequence[Tensor] = ()
    if learning and learn_from:
        batches = cut_windows(tokenizer, learn_from, options.window, options.samples, bos=options.bos).split(1)
    each = 2 * (len(windows) + len(recall))
    steps = Progress(2 * len(batches) + (each + 1) * len(missing), on_step)
    if results.find(recipe=DYNAMIC) is None:
        results.add(_dynamic_row(model, windows, options))
    learned = calibrate_many(model, batches, learning, backend=options.backend, on_batch=steps.part()) if learning else []
    sources = finished | {calibration.recipe.name: calibration for calibration in learned}
    for recipe in missing:
        source = sources.get(recipe.name, recipe)
        metrics = _row(model, source, windows, recall, options, steps)
        made_from = {"definition": definition(recipe), "tables": tables.get(recipe.name)}
        results.add({"recipe": recipe.name, **made_from, **metrics})


def _row(
    model: PreTrainedModel,
    source: Source,
    windows: Tensor,
    recall: Sequence[RecallBatch],
    options: CompareOptions,
    steps: Progress,
) -> dict[str, Any]:
    """The metrics of one recipe, measured alone so that its row can be stored, though the exact model runs anew for it."""
    chunk, backend = options.stream_chunk, options.backend
    (quality,) = measure(model, [source], windows, recall, stream_chunk=chunk, backend=backend, on_step=steps.part())
    cache = filled(model, source, windows[:1], options.context, backend)
    quality = with_bytes_of(quality, cache)
    timed = decoding(model, cache, windows[:1], options.decode_steps)
    steps.part()(1, 1)
    metrics = quality.to_dict()
    del metrics["recipe"]
    cached = {"context": options.context, "backend": cache.backend, "threads": torch.get_num_threads()}
    return {**metrics, **cached, "rates": _rates(source), **timed}


def _rates(source: Source) -> dict[str, dict[str, list[int]]] | None:
    """How many units of 8 coefficients have 0, 1, ... bits, by tensor and layer; None where no rates were allocated."""
    if not isinstance(source, Calibration) or all(
        pair[0].scheme.quantization.counts is None for pair in source.layers.values()
    ):
        return None
    return {
        name: {str(layer): list(pair[side].scheme.quantization.counts or ()) for layer, pair in source.layers.items()}
        for side, name in enumerate(("keys", "values"))
    }


def _dynamic_row(model: PreTrainedModel, windows: Tensor, options: CompareOptions) -> dict[str, Any]:
    cache = filled_dynamic(model, windows[:1], options.context)
    nbytes = nbytes_of(cache)
    return {
        "recipe": DYNAMIC,
        "bits_per_element": 8.0 * model.dtype.itemsize,
        "nbytes": nbytes,
        "context": options.context,
        "backend": "transformers",
        "threads": torch.get_num_threads(),
        **decoding(model, cache, windows[:1], options.decode_steps),
    }
