"""What each part of the narrow recipes gives: `python -m benchmarks.narrow_parts MODEL [MODEL ...] --out results/parts`.

`narrow3.0` on real models, whole and with one part left out at a time, by the package itself: tables of the built-in mix,
scored as in `benchmarks.real_models`. All variants keep within the budget but `one rate for all`, whose bits are printed. One
file for each model, which goes on where it was interrupted.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.peer_methods.base import lloyd_max
from benchmarks.real_models import SPREAD, WINDOW, load
from narrowkv import calibrate_many, get_recipe
from narrowkv.calibration import rates, search, shares, trellis_fit
from narrowkv.calibration.trellis_fit import SHRINKAGE, Transform, TrellisFit
from narrowkv.codec import Scheme
from narrowkv.codec.pairs import to_pairs
from narrowkv.codec.trellis import NIBBLE, TrellisTables
from narrowkv.defaults import REFERENCE_TOKENS
from narrowkv.evaluate.perplexity import filled, measure
from narrowkv.evaluate.results import ResultFile
from narrowkv.evaluate.windows import cut_windows
from narrowkv.integrations import calibrator
from narrowkv.methods import Recipe, SearchSpace

KIND = "narrow-parts"
WHOLE = get_recipe("narrow3.0")
LLOYD_MAX = (1.0, 0.3634, 0.11748, 0.03454, 0.009497, 0.00349, 0.00104)  # of a Gaussian; 5 and 6 bits: evenly spaced levels


def search_space() -> SearchSpace:
    """Of the whole recipe."""
    assert WHOLE.search_space is not None
    return WHOLE.search_space


def channels(x: Tensor, fisher: Tensor, whole: bool) -> Transform:
    """Instead of `transform_of`: every channel is a coefficient, over its standard deviation."""
    assert not whole
    variance = x.square().mean(1).clamp(min=1e-20)
    cost = variance * fisher.diagonal(dim1=1, dim2=2).clamp(min=1e-20)
    return Transform(torch.diag_embed(to_pairs(variance.sqrt())), cost + SHRINKAGE * cost.mean(1, keepdim=True))


def scalar_tables() -> tuple[TrellisTables, tuple[float, ...]]:
    """Tables that look at an element's own bits alone: the levels of Lloyd and Max, and their grid steps."""
    high, low = torch.zeros(6, NIBBLE), torch.zeros(6, NIBBLE)
    for rate in range(1, 7):
        levels = lloyd_max(rate) if rate <= 4 else even_levels(rate)
        low[rate - 1] = levels[torch.arange(NIBBLE) % len(levels)][:NIBBLE]
        if rate > 4:
            step = float(levels[1] - levels[0])
            high[rate - 1] = NIBBLE * step * (torch.arange(NIBBLE) % 2 ** (rate - 4))
    entries, steps = trellis_fit.on_grid(torch.stack([high, low], 1))
    return TrellisTables(entries[:, 0], entries[:, 1]), tuple(steps.tolist())


def even_levels(rate: int) -> Tensor:
    """Evenly spaced ones, of least squared error."""
    x = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    levels = torch.arange(2**rate, dtype=torch.float64) - (2**rate - 1) / 2
    steps = torch.linspace(0.05, 0.4, 100, dtype=torch.float64)
    errors = [
        (x - step * (x / step - 0.5).round().clamp(levels[0] - 0.5, levels[-1] - 0.5) - step / 2).square().mean()
        for step in steps
    ]
    return (levels * steps[int(torch.stack(errors).argmin())]).float()


def one_rate(menus: Sequence[Sequence[Any]], budget: float, fixed: float = 0.0) -> list[Any]:
    """Instead of `allocate_rates`: 3 bits for every coefficient."""
    return [menu[-1].with_counts(torch.full((len(menu[-1].costs),), 3, dtype=torch.int64)) for menu in menus]


@dataclass(frozen=True)
class Variant:
    """The recipe with a part left out. recipe: what it says. patches: modules, names of theirs, and what stands there then."""

    name: str
    recipe: Recipe = WHOLE
    patches: tuple[tuple[Any, str, Any], ...] = field(default=())


def with_schemes(keys: Iterable[Scheme], values: Iterable[Scheme]) -> Recipe:
    """The recipe with other schemes to choose from."""
    return replace(WHOLE, search_space=replace(search_space(), keys=tuple(keys), values=tuple(values)))


def variants() -> list[Variant]:
    """All of them, the whole recipe first."""
    keys, values = search_space().keys, search_space().values
    by_pairs = with_schemes(keys, [scheme for scheme in values if not scheme.transform.learned_rotation])
    no_exact = with_schemes(*([scheme.with_settings(outliers=0.0) for scheme in side] for side in (keys, values)))
    no_norms = with_schemes(keys, [scheme.with_settings(token_norm=False) for scheme in values])
    scalar, steps = scalar_tables()
    errors = partial(torch.tensor, LLOYD_MAX, dtype=torch.float64)
    fixed = ((trellis_fit, "ROUNDS", 0),)
    return [
        Variant("whole"),
        Variant("(a) channels as they are, weighted", by_pairs, ((trellis_fit, "transform_of", channels),)),
        Variant("(a) values by pairs", by_pairs),
        Variant("(a) keys after the rotary embedding", get_recipe("narrow3.0-postrope")),
        Variant("(b) equal bytes in all layers", get_recipe("narrow3.0-equal")),
        Variant("(b) one rate for all", patches=((shares, "allocate_rates", one_rate),)),
        Variant(
            "(c) scalar levels of Lloyd and Max",
            patches=(
                *fixed,
                (trellis_fit, "gaussian_tables", lambda: scalar),
                (trellis_fit, "STEPS", steps),
                (trellis_fit, "squared_errors", errors),
                (rates, "squared_errors", errors),
            ),
        ),
        Variant("(d) no exact elements", no_exact),
        Variant("(e) no token norms of values", no_norms),
        Variant("(e) tables of a Gaussian, not learned", patches=fixed),
        Variant(
            "(e) values not made unbiased", patches=((trellis_fit, "_unbiased", lambda steps, errors, scheme: steps.clone()),)
        ),
        Variant("(e) no shrinkage", patches=((trellis_fit, "SHRINKAGE", 0.0),)),
    ]


@contextmanager
def left_out(wanted: Sequence[Variant]) -> Iterator[None]:
    """Within, what is learned of the recipe with a variant's name is that variant's."""
    by_name, learn = {variant.name: variant for variant in wanted}, search.learn

    def learn_variant(recipe: Recipe, fits: Any) -> Any:
        for fitted in fits.values():
            for fit in fitted.fits.values():
                if isinstance(fit, TrellisFit):
                    fit._transforms.clear()
                    fit._quantizers.clear()
        with ExitStack() as stack:
            for module, name, other in by_name[recipe.name].patches:
                stack.enter_context(patch.object(module, name, other))
            return learn(recipe, fits)

    with patch.object(calibrator, "learn", learn_variant):
        yield


def run(name: str, options: argparse.Namespace) -> ResultFile:
    """All rows that a model's file lacks."""
    model = Path(name).name
    settings = {"model": model, "windows": options.windows, "context": REFERENCE_TOKENS}
    results = ResultFile(options.out / f"{model}.json", KIND, f"python -m benchmarks.narrow_parts {model}", settings)
    wanted = [variant for variant in variants() if results.find(variant=variant.name) is None]
    if not wanted:
        return results
    subject = load(name)
    text, samples = subject.learned["mix"]
    batches = cut_windows(subject.tokenizer, text, WINDOW, samples).split(1)
    recipes = [replace(variant.recipe, name=variant.name) for variant in wanted]
    with left_out(wanted):
        calibrations = calibrate_many(subject.model, batches, recipes)
    windows = {
        kind: cut_windows(subject.tokenizer, scored, WINDOW, options.windows, spread=SPREAD)
        for kind, scored in subject.scored.items()
    }
    found = {kind: measure(subject.model, calibrations, cut, stream_chunk=None) for kind, cut in windows.items()}
    for i, calibration in enumerate(calibrations):
        with torch.inference_mode():
            bits = filled(subject.model, calibration, windows["code"][:1], REFERENCE_TOKENS).bits_per_element
        losses = {kind: rows[i].kld_strict for kind, rows in found.items()}
        results.add({"variant": calibration.recipe.name, "bits_per_element": bits, **losses})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of models, or hub ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=2, help="of 512 tokens, scored of each text")
    options = parser.parse_args()
    for name in options.models:
        for row in run(name, options).rows:
            figures = f"{row['bits_per_element']:5.2f} bits  {row['encyclopedia']:.4f} / {row['code']:.4f}"
            print(f"{Path(name).name:20} {row['variant']:40} {figures}", flush=True)


if __name__ == "__main__":
    main()
