"""Long-context tasks: answers of recipes compared with the 16-bit cache, by task, length and depth."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from narrowkv.attention import AUTO
from narrowkv.calibration import Calibration
from narrowkv.defaults import NEW_TOKENS, TASK_DEPTHS, TASK_LENGTHS, TASK_ROWS
from narrowkv.errors import OutputError, TextError
from narrowkv.evaluate.finished import finished_for, require_text, tables_checksum
from narrowkv.evaluate.perplexity import Source, recalled
from narrowkv.evaluate.results import ResultFile, definition
from narrowkv.evaluate.retrieval import RecallBatch
from narrowkv.evaluate.task_files import Question, read_questions
from narrowkv.evaluate.task_rows import BY_DEPTH, MAKERS, make_rows
from narrowkv.evaluate.windows import Text, cut_windows, encode, joined, prompt_tokens
from narrowkv.files import checksum
from narrowkv.integrations import PackedCache, calibrate_many
from narrowkv.integrations.calibrator import counted
from narrowkv.integrations.probe import text_config
from narrowkv.integrations.versions import CACHE
from narrowkv.methods import Recipe, get_recipe

KIND = "tasks"
BASELINE = "16 bit"  # the model with its own cache


@dataclass(frozen=True)
class TaskOptions:
    """Settings of the metrics, besides model, texts and recipes.

    tasks: of `MAKERS`. lengths: tokens of a row. depths: from 0 to 1, of the passkey. rows: of each task,
    length and depth. window, samples: of the calibration. new_tokens: generated for a question of a file. limit: questions of
    each file at most. backend: of the caches. bos: what rows and windows begin with, like those of `cut_windows`.
    """

    tasks: tuple[str, ...] = tuple(MAKERS)
    lengths: tuple[int, ...] = TASK_LENGTHS
    depths: tuple[float, ...] = TASK_DEPTHS
    rows: int = TASK_ROWS
    window: int = 2048
    samples: int = 16
    new_tokens: int = NEW_TOKENS
    limit: int | None = None
    backend: str = AUTO
    bos: bool | None = None

    def settings(self) -> dict[str, Any]:
        """Those that all metrics of a file share: tasks, lengths and depths may be added later."""
        return {name: what for name, what in asdict(self).items() if name not in ("tasks", "lengths", "depths")}


@dataclass(frozen=True)
class _Cell:
    """One figure to be measured for every recipe: the key of its row, its other fields, and the function that measures it."""

    keys: dict[str, Any]
    recorded: dict[str, Any]
    score: Callable[[Source | None], float]


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    recipes: Sequence[str | Recipe],
    text: Text,
    learn_from: Text | None,
    options: TaskOptions,
    results: ResultFile,
    files: Sequence[Path] = (),
    on_step: Callable[[int, int], None] | None = None,
    calibrations: Sequence[Calibration] = (),
) -> None:
    """Measure what `results` has no row of yet, with the model's own cache (`16 bit`) and with each recipe.

    text: running text in which facts are stated. learn_from: the text from which recipes that need it learn; several texts
    have their share of windows each. calibrations: finished ones, whose recipes learn nothing. files: of LongBench or
    RULER, see `task_files`. on_step: called with (steps done, steps in all). Rows: task, length and depth (or
    None), recipe and its definition (a checksum), score (the mean, 0 to 1), rows (how many), measure; of files, whose length
    is a mean, the sha256 too.

    The tasks are scored strictly: every element attended to has gone through the quantizer, and a row is right if each token
    of the answer is the most likely after those before it, which is when a greedy answer is exact. Questions of files are
    answered as in use: the prompt attends exactly to itself, the greedy answer to the packed prompt.

    Raises TextError where a text is missing or a length does not fit the task or the model, OutputError where the file has
    metrics of other questions or of another recipe of the same name, and CalibrationError where a calibration fits neither
    model nor recipes.
    """
    chosen = [get_recipe(recipe) for recipe in recipes]
    finished = finished_for(model, chosen, calibrations)
    tables = {name: tables_checksum(calibration) for name, calibration in finished.items()}
    cells = [*_task_cells(model, tokenizer, text, options, results.seed), *_file_cells(model, tokenizer, files, options)]
    learning = [
        recipe
        for recipe in chosen
        if recipe.needs_calibration
        and recipe.name not in finished
        and any(_is_missing(cell, recipe.name, recipe, None, results) for cell in cells)
    ]
    batches = _batches(tokenizer, learning, learn_from, options)
    step = counted(on_step, 2 * len(batches) + len(cells) * (len(chosen) + 1))
    learned = calibrate_many(model, batches, learning, backend=options.backend, on_batch=step) if learning else []
    sources: dict[str, Source] = {**finished, **{calibration.recipe.name: calibration for calibration in learned}}
    asked: dict[str, Recipe | None] = {BASELINE: None, **{recipe.name: recipe for recipe in chosen}}
    for cell in cells:
        for name, recipe in asked.items():
            if _is_missing(cell, name, recipe, tables.get(name), results):
                score = cell.score(None if recipe is None else sources.get(name, recipe))
                made_from = {"recipe": name, "definition": definition(recipe), "tables": tables.get(name)}
                results.add({**cell.keys, **made_from, "score": score, **cell.recorded})
            step()


def _is_missing(cell: _Cell, name: str, recipe: Recipe | None, tables: str | None, results: ResultFile) -> bool:
    row = results.find_recipe(name, recipe, tables, **cell.keys)
    if row is None:
        return True
    if any(row.get(field) != what for field, what in cell.recorded.items()):
        raise OutputError(f"{results.path} has results of other questions for {cell.keys['task']}; name another folder.")
    return False


def _task_cells(model: PreTrainedModel, tokenizer: Any, text: Text, options: TaskOptions, seed: int) -> Iterator[_Cell]:
    unknown = [task for task in options.tasks if task not in MAKERS]
    if unknown:
        raise TextError(f"There is no task {unknown[0]!r}; there are {', '.join(MAKERS)}.")
    filler = encode(tokenizer, joined(text))
    most = _positions(model)
    for task in options.tasks:
        for length in options.lengths:
            if length > most:
                raise TextError(f"The model has {most:,} positions, a length of {length:,} does not fit; give smaller ones.")
            for depth in options.depths if task in BY_DEPTH else (None,):
                batch = make_rows(task, tokenizer, filler, length, options.rows, seed, depth, options.bos)
                yield _Cell(
                    {"task": task, "length": length, "depth": depth},
                    {"rows": options.rows, "measure": "exact answer"},
                    functools.partial(_recalled, model, batch, options.backend),
                )


def _file_cells(model: PreTrainedModel, tokenizer: Any, files: Sequence[Path], options: TaskOptions) -> Iterator[_Cell]:
    for path in files:
        questions = read_questions(path, options.limit)
        pairs = [(question, _prompt(model, tokenizer, path, question, options)) for question in questions]
        measures = sorted({question.metric.__name__.replace("_", " ") for question in questions})
        yield _Cell(
            {"task": str(path)},
            {
                "length": sum(ids.shape[1] for _, ids in pairs) // len(pairs),
                "depth": None,
                "rows": len(pairs),
                "measure": ", ".join(measures),
                "sha256": checksum(path.read_bytes()),
            },
            functools.partial(_answered, model, tokenizer, pairs, options),
        )


@torch.inference_mode()
def _recalled(model: PreTrainedModel, batch: RecallBatch, backend: str, source: Source | None) -> float:
    return recalled(model, source, batch, backend)


def _answered(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[Question, torch.Tensor]], options: TaskOptions, source: Source | None
) -> float:
    """The mean score of greedy answers."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    scores = []
    for question, ids in pairs:
        cache = None if source is None else PackedCache(model, source, backend=options.backend)
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),  # a padding token in the prompt is text like any other
                **{CACHE: cache},
                max_new_tokens=options.new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        given = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        scores.append(question.metric(given, question.accepted))
    return sum(scores) / len(scores)


def _prompt(model: PreTrainedModel, tokenizer: Any, path: Path, question: Question, options: TaskOptions) -> torch.Tensor:
    """Token ids [1, tokens] of a question, without its middle where it is too long and that is usual."""
    ids = prompt_tokens(tokenizer, question.prompt, options.bos).to(model.device)
    most = _positions(model) - options.new_tokens
    if ids.shape[1] <= most:
        return ids
    if not question.cut or most < 2:
        raise TextError(
            f"{path}, line {question.line} has {ids.shape[1]:,} tokens, but the model has space for {most:,} before an answer "
            f"of {options.new_tokens}; give shorter questions, or a model of more positions."
        )
    return torch.cat([ids[:, : most // 2], ids[:, -(most - most // 2) :]], dim=1)


def _positions(model: PreTrainedModel) -> int:
    """Positions that the model is said to have; as many as one likes where it says nothing."""
    return getattr(text_config(model), "max_position_embeddings", None) or 2**62


def _batches(
    tokenizer: Any, learning: Sequence[Recipe], learn_from: Text | None, options: TaskOptions
) -> tuple[torch.Tensor, ...]:
    require_text(learning, learn_from)
    if not learning or not learn_from:
        return ()
    return cut_windows(tokenizer, learn_from, options.window, options.samples, bos=options.bos).split(1)
