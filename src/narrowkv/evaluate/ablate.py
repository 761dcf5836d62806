"""The ablations of `ablations.py` climbed on one model and text, and what calibration takes: a row of metrics for each
step.
"""

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
from narrowkv.evaluate.ablations import ABLATIONS, OWN_TEXT, AblationStep, kvquant, require_widths, rotates, texts
from narrowkv.evaluate.finished import finished_for, implements, tables_checksum
from narrowkv.evaluate.perplexity import Quality, Source, filled, measure, with_bytes_of
from narrowkv.evaluate.progress import OnStep, Progress
from narrowkv.evaluate.results import ResultFile, definition
from narrowkv.evaluate.sensitivity import part_losses
from narrowkv.evaluate.windows import Text, cut_apart, cut_windows
from narrowkv.integrations import calibrate_many
from narrowkv.integrations.preparation import model_info_for
from narrowkv.methods import Recipe, get_recipe

KIND = "ablate"
NAMES = (*ABLATIONS, "texts", "times")
SAME_TEXT, RANDOM = "scored text, further on", "random tokens"
TIMED = ("nuq3", "nuq3-1%", "narrow3")
Learned = dict[str, Calibration]


@dataclass(frozen=True)
class AblateOptions:
    """Settings of the metrics, besides model and texts.

    bits: widths at which ablations are climbed. window: tokens per sequence. limit: windows scored at most. samples: sequences
    to calibrate on. context: tokens of the cache whose bits are counted. backend: of the caches. bos: what windows begin
    with, like those of `cut_windows`.
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
    ablations: Sequence[str],
    text: Text,
    learn_from: Text,
    options: AblateOptions,
    results: ResultFile,
    on_step: OnStep | None = None,
    others: Mapping[str, str] | None = None,
    calibrations: Sequence[Calibration] = (),
) -> None:
    """Run ablations (of NAMES) and add those rows that `results` does not have yet.

    text: to score. learn_from: to calibrate on; several texts have their share of windows each. others: further texts to
    calibrate on for the ablation `texts`, by name. calibrations: finished ones, of recipes that are steps here. Raises
    RecipeError for a ablation or a width that does not exist, TextError where a text is too short, CalibrationError where a
    calibration fits neither model nor ablations.
    """
    if unknown := sorted(set(ablations) - set(NAMES)):
        raise RecipeError(f"There is no ablation {unknown[0]!r}; there are {', '.join(NAMES)}.")
    require_widths(options.bits)
    _Ablation(model, tokenizer, text, learn_from, options, results, others or {}).run(ablations, calibrations, on_step)


class _Ablation:
    """What all ablations share: the model, windows of text, and the file of results."""

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
        self.info = model_info_for(model, options.backend, [])
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

    def run(self, ablations: Sequence[str], calibrations: Sequence[Calibration], on_step: OnStep | None) -> None:
        every = self._steps(ablations)
        self.finished = self._finished([ablation_step for _, ablation_step in every], calibrations)
        ablation_steps = self._missing(every)
        layers = "parts" in ablations and self.results.find(ablation="parts", side="layers") is None
        timed = [name for name in TIMED if "times" in ablations and self.results.find(ablation="times", label=name) is None]
        own, each = len(self.texts[OWN_TEXT]), 2 * len(self.windows)
        cost = sum(2 * count for _, count in ablation_steps) + sum(each * len(group) for group in ablation_steps.values())
        cost += layers * (2 * own + 2 * len(self.info.attention) * len(self.windows)) + len(timed) * 2 * own
        steps = Progress(cost, on_step)
        for (text, count), group in ablation_steps.items():
            learned = self._learn([ablation_step.recipe for _, ablation_step in group], text, count, steps.part())
            for ablation, ablation_step in group:
                self._add(
                    ablation, ablation_step, learned.get(ablation_step.recipe.name, ablation_step.recipe), count, steps.part()
                )
        if layers:
            self._add_layers(steps)
        for name in timed:
            self._add_time(name, steps.part())

    def _steps(self, ablations: Sequence[str]) -> list[tuple[str, AblationStep]]:
        """All steps and their ablations."""
        found = [
            (name, ablation_step)
            for name in ablations
            if name in ABLATIONS
            for ablation_step in ABLATIONS[name](self.options.bits, self.info)
        ]
        if "texts" in ablations:
            sequences = {name: len(windows) for name, windows in self.texts.items()}
            found += [("texts", ablation_step) for ablation_step in texts(self.options.bits, self.info, sequences)]
        return found

    def _finished(self, ablation_steps: Sequence[AblationStep], calibrations: Sequence[Calibration]) -> Learned:
        """The calibrations that are given, by the name of the step's recipe that they implement."""
        recipes = [ablation_step.recipe for ablation_step in ablation_steps if self._learns_all(ablation_step)]
        renamed = []
        for calibration in calibrations:
            name = next((recipe.name for recipe in recipes if implements(calibration.recipe, recipe)), None)
            if name is None:
                raise CalibrationError(
                    f"A calibration is given for recipe {calibration.recipe.name}, which is no step of these ablations; "
                    "give one of a step, such as nuq3-1%."
                )
            renamed.append(replace(calibration, recipe=replace(calibration.recipe, name=name)))
        return finished_for(self.model, recipes, renamed)

    def _count(self, ablation_step: AblationStep) -> int:
        """Sequences that a step learns from."""
        return ablation_step.sequences or len(self.texts[ablation_step.text])

    def _learns_all(self, ablation_step: AblationStep) -> bool:
        return ablation_step.text == OWN_TEXT and self._count(ablation_step) == len(self.texts[OWN_TEXT])

    def _tables(self, ablation_step: AblationStep) -> str | None:
        """A checksum of the tables that are given for a step, if there are any."""
        given = self.finished.get(ablation_step.recipe.name) if self._learns_all(ablation_step) else None
        return None if given is None else tables_checksum(given)

    def _missing(
        self, ablation_steps: Sequence[tuple[str, AblationStep]]
    ) -> dict[tuple[str, int], list[tuple[str, AblationStep]]]:
        """Steps without a row, and their ablations, by the text and number of sequences that they learn from."""
        found: dict[tuple[str, int], list[tuple[str, AblationStep]]] = {}
        for name, ablation_step in ablation_steps:
            row = self.results.find(ablation=name, label=ablation_step.label, **ablation_step.parameters)
            if row is None:
                found.setdefault((ablation_step.text, self._count(ablation_step)), []).append((name, ablation_step))
            elif self._tables(ablation_step) not in (None, row["tables"]):
                raise OutputError(
                    f"{self.results.path} has results of other tables for {ablation_step.label!r}; name another folder."
                )
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

    def _add(self, ablation: str, ablation_step: AblationStep, source: Source, sequences: int, on_step: OnStep) -> None:
        """Add the row of a step; what another ablation has measured already is not measured again."""
        made_from = {
            "definition": definition(ablation_step.recipe),
            "learned_from": ablation_step.text,
            "learned_sequences": sequences,
        }
        made_from["tables"] = self._tables(ablation_step)
        known = self.results.find(**made_from)
        steps = 2 * len(self.windows)
        if known is None:
            (quality,) = measure(self.model, [source], self.windows, backend=self.options.backend, on_step=on_step)
            cache = filled(self.model, source, self.windows[:1], self.options.context, self.options.backend)
            metrics = with_bytes_of(quality, cache).to_dict()
        else:
            metrics = {field.name: known[field.name] for field in fields(Quality)}
            on_step(steps, steps)
        self.results.add(
            {"ablation": ablation, "label": ablation_step.label, **ablation_step.parameters, **made_from, **metrics}
        )

    def _add_layers(self, steps: Progress) -> None:
        """What the keys and the values of each layer cost alone, at the narrowest width, in one row."""
        width = min(self.options.bits)
        recipe = kvquant(width, self.info)
        learned = self._learn([recipe], OWN_TEXT, len(self.texts[OWN_TEXT]), steps.part())
        losses = part_losses(self.model, learned[recipe.name], self.windows, on_step=steps.part())
        cells = [{"layer": layer, "side": side, "kld_strict": loss} for (layer, side), loss in losses.items()]
        self.results.add({"ablation": "parts", "label": "each layer alone", "side": "layers", "bits": width, "layers": cells})

    def _add_time(self, name: str, on_step: OnStep) -> None:
        """Seconds of both passes over the text, and of what follows them, by the wall clock."""
        recipe = get_recipe(name if rotates(self.info) else f"{name}-postrope")
        batches = self.texts[OWN_TEXT].split(1)
        at = [time.perf_counter()]

        def step(done: int, total: int) -> None:
            at.append(time.perf_counter())
            on_step(done, total)

        calibrate_many(self.model, batches, [recipe], backend=self.options.backend, on_batch=step)
        end, middle = time.perf_counter(), at[len(batches)]
        self.results.add(
            {
                "ablation": "times",
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
