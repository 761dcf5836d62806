"""The plan: what recipes take at given contexts, and the longest context that each leaves space for."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from narrowkv.calibration.allocation import Option, allocate, stored_bits
from narrowkv.calibration.rates import RateOption, counted_tokens, mean_counted_tokens
from narrowkv.calibration.search import overhead_bits
from narrowkv.calibration.shares import allocate_budgets
from narrowkv.codec import Scheme
from narrowkv.codec.scheme_parts import BLOCK, UNIT
from narrowkv.errors import BudgetError, RecipeError
from narrowkv.evaluate.results import ResultFile, definition
from narrowkv.methods import LayerSchemes, Recipe
from narrowkv.methods.recipe import SearchSpace
from narrowkv.plan.layers import CHUNK, AllocatedBytes, LayerBytes, LayerShape, stand_in, typical_block
from narrowkv.plan.models import ModelShape

KIND = "plan"
SPAN = 4  # bits between the dearest and the cheapest unit of a head, where nothing is known of them
MOST_TOKENS = 2**40  # a context that is called unlimited


@dataclass(frozen=True)
class Budget:
    """batch: sequences at a time. devices: under tensor parallelism. memory: bytes of each device; None for no limit.
    reserve: bytes of it that are reserved for activations and all else. weight_bits: of each weight; None for the dtype's.

    Raises BudgetError where there is no sequence or no device.
    """

    batch: int = 1
    devices: int = 1
    memory: int | None = None
    reserve: int = 0
    weight_bits: float | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.devices < 1:
            raise BudgetError("A plan needs one sequence and one GPU at least.")
        if self.weight_bits is not None and not 0 < self.weight_bits <= 64:
            raise BudgetError(f"Weights have more than 0 and at most 64 bits each, not {self.weight_bits:g}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def evenly_chosen(recipe: Recipe, shape: ModelShape) -> Recipe:
    """A recipe that leaves the choice of schemes to calibration, with a choice that fills its budget as if all layers were
    as sensitive; calibration's own choice takes at most the same budget.
    """
    if recipe.search_space is None:
        return recipe
    elements = sum(2 * layer.kv_heads * layer.head_dim for layer in shape.layers)
    choose = _even_rates if recipe.search_space.by_rate else _even_choice
    try:
        schemes = choose(recipe.search_space, shape, elements, overhead_bits(_stored_elements(shape), recipe.sinks))
    except RecipeError as error:
        raise RecipeError(f"Recipe {recipe.name}: {error}") from error
    pairs = zip(schemes[::2], schemes[1::2], strict=True)
    layers = {layer.layer: LayerSchemes(*pair) for layer, pair in zip(shape.layers, pairs, strict=True)}
    return replace(recipe, layers=layers, search_space=None)


def _even_choice(search_space: SearchSpace, shape: ModelShape, elements: int, overhead: float) -> list[Scheme]:
    """A scheme for the keys, then for the values, of each layer."""
    menus, tokens = [], mean_counted_tokens(_stored_elements(shape))
    for layer in shape.layers:
        one = LayerShape(1, layer.kv_heads, layer.head_dim, shape.dtype)
        for schemes, keys in ((search_space.keys, True), (search_space.values, False)):
            menus.append([_option(scheme, one, keys, tokens) for scheme in schemes])
    picks = allocate(menus, search_space.budget, elements, overhead)
    return [menu[pick].scheme for menu, pick in zip(menus, picks, strict=True)]


def _even_rates(search_space: SearchSpace, shape: ModelShape, elements: int, overhead: float) -> list[Scheme]:
    """The same with rates, as if what units cost fell alike from the dearest to the cheapest in all tensors."""
    menus, tokens = [], mean_counted_tokens(_stored_elements(shape))
    for layer in shape.layers:
        for scheme in (*search_space.keys, *search_space.values):
            scheme.require_head_dim(layer.head_dim)
        counted = counted_tokens(layer.sliding_window)
        units = layer.head_dim // UNIT
        costs = 4.0 ** (-SPAN * torch.arange(units, dtype=torch.float64, device="cpu") / units)
        for schemes in (search_space.keys, search_space.values):
            menus.append([RateOption(scheme, layer.kv_heads, costs, tokens, counted) for scheme in schemes])
    return allocate_budgets(search_space, menus, overhead)


def _stored_elements(shape: ModelShape) -> list[tuple[int, int]]:
    return [(counted_tokens(layer.sliding_window), layer.kv_heads * layer.head_dim) for layer in shape.layers]


@functools.cache
def _option(scheme: Scheme, shape: LayerShape, keys: bool, tokens: float) -> Option:
    """What a scheme takes; its cost is that of rounding to this many bits. tokens: over which tables count."""
    quantizer = stand_in(scheme, shape.kv_heads, shape.head_dim)
    bits = stored_bits(quantizer, typical_block(quantizer, shape), keys, tokens)
    cost = 4 ** (-bits / (shape.kv_heads * shape.head_dim))
    return Option(scheme, bits, cost)


class CacheBytes:
    """Counts what a cache takes in each device, at any length."""

    def __init__(self, shape: ModelShape, recipe: Recipe, batch: int = 1, devices: int = 1):
        """Raises RecipeError or BudgetError where these do not fit together."""
        parts = shape.parts(devices)
        recipe.require_layers([layer.layer for layer in shape.layers])
        recipe = evenly_chosen(recipe, shape)
        kinds: Counter[tuple[LayerSchemes, LayerShape]] = Counter()
        self.records: dict[str, tuple[LayerBytes, torch.Tensor]] = {}
        meters: dict[tuple[LayerSchemes, LayerShape], LayerBytes] = {}
        for layer in shape.layers:
            schemes = recipe.schemes(layer.layer)
            sizes = (batch, layer.kv_heads // parts, layer.head_dim)
            one = LayerShape(*sizes, shape.dtype, layer.sliding_window, layer.constants)
            if (schemes, one) not in meters:
                for scheme in (schemes.keys, schemes.values):
                    scheme.require_head_dim(layer.head_dim)
                pair = (stand_in(scheme, one.kv_heads, one.head_dim) for scheme in (schemes.keys, schemes.values))
                meters[schemes, one] = LayerBytes((next(pair), next(pair)), recipe.sinks, recipe.residual_length, one)
            kinds[schemes, one] += 1
            if layer.record is not None and (schemes.keys.transform.pre_rope or meters[schemes, one].bias.keys is not None):
                self._keep(layer.record, layer.angles, meters[schemes, one])
        self.layers = [(meters[kind], count) for kind, count in kinds.items()]
        self.tables = sum(meter.tables * count for meter, count in self.layers)

    def _keep(self, record: str, angles: int, meter: LayerBytes) -> None:
        """What is stored of each token once for several layers stays until none of them needs it."""
        batch, dtype = meter.shape.batch, meter.shape.dtype
        entry = (
            torch.zeros(batch, 1, 2, angles, dtype=dtype, device="cpu")
            if angles
            else torch.zeros(batch, 1, dtype=torch.int32, device="cpu")
        )
        known = self.records.get(record)
        if known is None or _window(meter) > _window(known[0]):
            self.records[record] = (meter, entry)

    def allocated(self, tokens: int) -> AllocatedBytes:
        """All that is allocated behind a prompt of this many tokens."""
        total = AllocatedBytes(self.tables, self.tables)
        for meter, count in self.layers:
            total += meter.allocated(tokens) * count
        for meter, entry in self.records.values():
            total += meter.records(tokens, entry)
        return total

    def longest(self, capacity: int) -> int | None:
        """The longest prompt, in whole blocks (chunks where windows slide), from which decoding can go on in this many bytes.

        None where there is no end, since only windows are stored.
        """
        step = CHUNK if any(meter.shape.sliding_window is not None for meter, _ in self.layers) else BLOCK
        low, high = 0, 64
        while self.allocated(high * step).most <= capacity:
            low, high = high, 2 * high
            if high * step > MOST_TOKENS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.allocated(middle * step).most <= capacity else (low, middle)
        return low * step


def _window(meter: LayerBytes) -> float:
    return float("inf") if meter.shape.sliding_window is None else meter.shape.sliding_window


def plan(
    shape: ModelShape,
    recipes: Sequence[Recipe],
    contexts: Sequence[int],
    budget: Budget,
    results: ResultFile,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Add a row for each recipe: bytes for each device at these contexts, and the longest context under the budget.

    on_step: called with (recipes done, recipes in all). Raises BudgetError where not even the weights fit, OutputError
    where results has a row of another recipe of the same name.
    """
    weights = shape.weight_bytes(budget.devices, budget.weight_bits)
    capacity = None if budget.memory is None else budget.memory - budget.reserve - weights
    if capacity is not None and capacity <= 0:
        raise BudgetError(
            f"The weights of {shape.name} take {weights / 2**30:.1f} GiB of each GPU's {(weights + capacity) / 2**30:.1f} "
            f"GiB, "
            "which leaves no space for a cache; plan for more memory, more GPUs, or fewer bits a weight."
        )
    for done, recipe in enumerate(recipes):
        if results.find_recipe(recipe.name, recipe) is None:
            cache = CacheBytes(shape, recipe, budget.batch, budget.devices)
            longest = None if capacity is None else cache.longest(capacity)
            results.add(
                {
                    "recipe": recipe.name,
                    "definition": definition(recipe),
                    "weights": weights,
                    "tables": cache.tables,
                    "limited": longest is not None,
                    "longest": longest,
                    "contexts": [_at(cache, tokens, capacity) for tokens in contexts],
                    "curve": [_at(cache, tokens, capacity) for tokens in _doublings(max([*contexts, longest or 0]))],
                }
            )
        if on_step:
            on_step(done + 1, len(recipes))


def _at(cache: CacheBytes, tokens: int, capacity: int | None) -> dict[str, int | str | None]:
    at = cache.allocated(tokens)
    fits = None if capacity is None else "yes" if at.most <= capacity else "prompt only" if at.prompt <= capacity else "no"
    return {"tokens": tokens, "prompt": at.prompt, "decoding": at.decoding, "fits": fits}


def _doublings(longest: int) -> list[int]:
    """Lengths that double, up to the first beyond the longest."""
    lengths = [CHUNK]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return lengths
