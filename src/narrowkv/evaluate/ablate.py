"""The ladders of `ladders.py` climbed on one model and text, and what calibration takes: a row of figures for each rung."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv.attention import AUTO
from narrowkv.calibration import Calibration
from narrowkv.defaults import REFERENCE_TOKENS
from narrowkv.errors import CalibrationError, OutputError, RecipeError
from narrowkv.evaluate.finished import finished_for, implements, tables_checksum
from narrowkv.evaluate.ladders import LADDERS, OWN_TEXT, Rung, kvquant, require_widths, rotates, texts
from narrowkv.evaluate.parts import part_losses
from narrowkv.evaluate.quality import Quality, Source, filled, measure, with_bytes_of
from narrowkv.evaluate.results import ResultFile, definition
from narrowkv.evaluate.steps import OnStep, Steps
from narrowkv.evaluate.windows import Text, cut_apart, cut_windows
from narrowkv.integrations import calibrate_many
from narrowkv.integrations.preparation import facts_for
from narrowkv.methods import Recipe, get_recipe

KIND = "ablate"
NAMES = (*LADDERS, "texts", "times")
SAME_TEXT, RANDOM = "scored text, further on", "random tokens"
TIMED = ("nuq3", "nuq3-1%", "narrow3")
Learned = dict[str, Calibration]


@dataclass(frozen=True)
class AblateOptions:
    """What the figures depend on beside model and texts.

    bits: widths at which ladders are climbed. window: tokens per sequence. limit: windows scored at most. samples: sequences
    to calibrate on. context: tokens of the cache whose bits are counted. backend: of the caches. bos: what windows begin
    with, as of `cut_windows`.
    """

    bits: tuple[int, ...] = (4, 3, 2)
    window: int = 512
    limit: int | None = 4
    samples: int = 16
    context: int = REFERENCE_TOKENS
    backend: str = AUTO
    bos: bool | None = None


def ablate(
    model: PreTrainedModel,
    tokenizer: Any,
    ladders: Sequence[str],
    text: Text,
    learn_from: Text,
    options: AblateOptions,
    results: ResultFile,
    on_step: OnStep | None = None,
    others: Mapping[str, str] | None = None,
    calibrations: Sequence[Calibration] = (),
) -> None:
    """Climb ladders (of NAMES) and add those rows that `results` does not have yet.

    text: to score. learn_from: to calibrate on; several texts have their share of windows each. others: further texts to
    calibrate on for the ladder `texts`, by name. calibrations: finished ones, of recipes that are rungs here. Raises
    RecipeError for a ladder or a width that does not exist, TextError where a text is too short, CalibrationError where a
    calibration fits neither model nor ladders.
    """
    if unknown := sorted(set(ladders) - set(NAMES)):
        raise RecipeError(f"There is no ladder {unknown[0]!r}; there are {', '.join(NAMES)}.")
    require_widths(options.bits)
    _Climb(model, tokenizer, text, learn_from, options, results, others or {}).climb(ladders, calibrations, on_step)


class _Climb:
    """What all ladders share: the model, windows of text, and the file of results."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        text: Text,
        learn_from: Text,
        options: AblateOptions,
        results: ResultFile,
        others: Mapping[str, str],
    ):
        self.model, self.options, self.results = model, options, results
        self.facts = facts_for(model, options.backend, [])
        self.finished: dict[str, Calibration] = {}
        window, samples, bos = options.window, options.samples, options.bos
        if options.limit is None:
            self.windows, further = (
                cut_windows(tokenizer, text, window, bos=bos),
                torch.empty(0, dtype=torch.float32, device="cpu"),
            )
        else:
            self.windows, further = cut_apart(tokenizer, text, window, options.limit, samples, bos=bos)
        self.texts = {OWN_TEXT: cut_windows(tokenizer, learn_from, window, samples, bos=bos)}
        self.texts |= {name: cut_windows(tokenizer, words, window, samples, bos=bos) for name, words in others.items()}
        if len(further):
            self.texts[SAME_TEXT] = further
        embedding: Any = model.get_input_embeddings()
        vocabulary = min(len(tokenizer), len(embedding.weight))
        self.texts[RANDOM] = _random_like(self.texts[OWN_TEXT], vocabulary, results.seed)

    def climb(self, ladders: Sequence[str], calibrations: Sequence[Calibration], on_step: OnStep | None) -> None:
        every = self._rungs(ladders)
        self.finished = self._finished([rung for _, rung in every], calibrations)
        rungs = self._missing(every)
        layers = "parts" in ladders and self.results.find(ladder="parts", side="layers") is None
        timed = [name for name in TIMED if "times" in ladders and self.results.find(ladder="times", label=name) is None]
        own, each = len(self.texts[OWN_TEXT]), 2 * len(self.windows)
        cost = sum(2 * count for _, count in rungs) + sum(each * len(group) for group in rungs.values())
        cost += layers * (2 * own + 2 * len(self.facts.attention) * len(self.windows)) + len(timed) * 2 * own
        steps = Steps(cost, on_step)
        for (text, count), group in rungs.items():
            learned = self._learn([rung.recipe for _, rung in group], text, count, steps.part())
            for ladder, rung in group:
                self._add(ladder, rung, learned.get(rung.recipe.name, rung.recipe), count, steps.part())
        if layers:
            self._add_layers(steps)
        for name in timed:
            self._add_time(name, steps.part())

    def _rungs(self, ladders: Sequence[str]) -> list[tuple[str, Rung]]:
        """All rungs and their ladders."""
        climbed = [
            (name, rung) for name in ladders if name in LADDERS for rung in LADDERS[name](self.options.bits, self.facts)
        ]
        if "texts" in ladders:
            sequences = {name: len(windows) for name, windows in self.texts.items()}
            climbed += [("texts", rung) for rung in texts(self.options.bits, self.facts, sequences)]
        return climbed

    def _finished(self, rungs: Sequence[Rung], calibrations: Sequence[Calibration]) -> Learned:
        """The calibrations that are given, by the name of the rung's recipe that they implement."""
        recipes = [rung.recipe for rung in rungs if self._learns_all(rung)]
        renamed = []
        for calibration in calibrations:
            name = next((recipe.name for recipe in recipes if implements(calibration.recipe, recipe)), None)
            if name is None:
                raise CalibrationError(
                    f"A calibration is given for recipe {calibration.recipe.name}, which is no rung of these ladders; "
                    "give one of a rung, such as nuq3-1%."
                )
            renamed.append(replace(calibration, recipe=replace(calibration.recipe, name=name)))
        return finished_for(self.model, recipes, renamed)

    def _count(self, rung: Rung) -> int:
        """Sequences that a rung learns from."""
        return rung.sequences or len(self.texts[rung.text])

    def _learns_all(self, rung: Rung) -> bool:
        return rung.text == OWN_TEXT and self._count(rung) == len(self.texts[OWN_TEXT])

    def _tables(self, rung: Rung) -> str | None:
        """A checksum of the tables that are given for a rung, if there are any."""
        given = self.finished.get(rung.recipe.name) if self._learns_all(rung) else None
        return None if given is None else tables_checksum(given)

    def _missing(self, rungs: Sequence[tuple[str, Rung]]) -> dict[tuple[str, int], list[tuple[str, Rung]]]:
        """Rungs without a row, and their ladders, by the text and number of sequences that they learn from."""
        found: dict[tuple[str, int], list[tuple[str, Rung]]] = {}
        for name, rung in rungs:
            row = self.results.find(ladder=name, label=rung.label, **rung.place)
            if row is None:
                found.setdefault((rung.text, self._count(rung)), []).append((name, rung))
            elif self._tables(rung) not in (None, row["tables"]):
                raise OutputError(f"{self.results.path} has figures of other tables for {rung.label!r}; name another folder.")
        return found

    def _learn(self, recipes: Sequence[Recipe], text: str, count: int, on_step: OnStep) -> Learned:
        """Calibrations of those recipes that need one: finished ones, and the rest of one pass over the text."""
        own = text == OWN_TEXT and count == len(self.texts[OWN_TEXT])
        learned = dict(self.finished) if own else {}
        learning = {recipe.name: recipe for recipe in recipes if recipe.needs_calibration and recipe.name not in learned}
        batches = self.texts[text][:count].split(1)
        if not learning:
            on_step(2 * count, 2 * count)
            return learned
        found = calibrate_many(self.model, batches, list(learning.values()), backend=self.options.backend, on_batch=on_step)
        return learned | {calibration.recipe.name: calibration for calibration in found}

    def _add(self, ladder: str, rung: Rung, source: Source, sequences: int, on_step: OnStep) -> None:
        """Add the row of a rung; what another ladder has measured already is not measured again."""
        made_from = {"definition": definition(rung.recipe), "learned_from": rung.text, "learned_sequences": sequences}
        made_from["tables"] = self._tables(rung)
        known = self.results.find(**made_from)
        steps = 2 * len(self.windows)
        if known is None:
            (quality,) = measure(self.model, [source], self.windows, backend=self.options.backend, on_step=on_step)
            cache = filled(self.model, source, self.windows[:1], self.options.context, self.options.backend)
            figures = with_bytes_of(quality, cache).to_dict()
        else:
            figures = {field.name: known[field.name] for field in fields(Quality)}
            on_step(steps, steps)
        self.results.add({"ladder": ladder, "label": rung.label, **rung.place, **made_from, **figures})

    def _add_layers(self, steps: Steps) -> None:
        """What the keys and the values of each layer cost alone, at the narrowest width, in one row."""
        width = min(self.options.bits)
        recipe = kvquant(width, self.facts)
        learned = self._learn([recipe], OWN_TEXT, len(self.texts[OWN_TEXT]), steps.part())
        losses = part_losses(self.model, learned[recipe.name], self.windows, on_step=steps.part())
        cells = [{"layer": layer, "side": side, "kld_strict": loss} for (layer, side), loss in losses.items()]
        self.results.add({"ladder": "parts", "label": "each layer alone", "side": "layers", "bits": width, "layers": cells})

    def _add_time(self, name: str, on_step: OnStep) -> None:
        """Seconds of both passes over the text, and of what follows them, by the wall clock."""
        recipe = get_recipe(name if rotates(self.facts) else f"{name}-postrope")
        batches = self.texts[OWN_TEXT].split(1)
        at = [time.perf_counter()]

        def step(done: int, total: int) -> None:
            at.append(time.perf_counter())
            on_step(done, total)

        calibrate_many(self.model, batches, [recipe], backend=self.options.backend, on_batch=step)
        end, middle = time.perf_counter(), at[len(batches)]
        self.results.add(
            {
                "ladder": "times",
                "label": name,
                "tokens": self.texts[OWN_TEXT].numel(),
                "threads": torch.get_num_threads(),
                "seconds_ranges": middle - at[0],
                "seconds_gradients": at[-1] - middle,
                "seconds_fit": end - at[-1],
            }
        )


def _random_like(windows: Tensor, vocabulary: int, seed: int) -> Tensor:
    """Windows of the same shape of tokens drawn evenly from the vocabulary, which are no text at all."""
    return torch.randint(
        vocabulary, windows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu"
    )
