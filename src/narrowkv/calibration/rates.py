"""Rate allocation: how many bits each unit of 8 coefficients of each tensor has, under one budget for the whole cache."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowkv.codec import Scheme, TrellisQuantizer
from narrowkv.codec.gaussian_tables import SQUARED_ERRORS
from narrowkv.codec.scheme_parts import BLOCK, MOST_RATE, UNIT
from narrowkv.defaults import REFERENCE_TOKENS
from narrowkv.errors import RecipeError
from narrowkv.store.page import OUTLIER_BYTES

OFFSET_BITS = 32 / BLOCK  # of each token and head: where a block's outliers begin
LEAST_TOKENS = 512  # that a layer counts as storing, however short its window is
HALVINGS = 60  # of the range in which the price of a bit lies


def counted_tokens(sliding_window: int | None) -> int:
    """How many tokens a layer counts as storing, of 32,768."""
    return max(min(sliding_window or REFERENCE_TOKENS, REFERENCE_TOKENS), LEAST_TOKENS)


def mean_counted_tokens(layers: Iterable[tuple[int, int]]) -> float:
    """How many tokens layers store on average, by the elements of a token: what their tables are counted over.

    layers: of each, the tokens and the elements.
    """
    layers = list(layers)
    return sum(tokens * elements for tokens, elements in layers) / sum(elements for _, elements in layers)


def squared_errors() -> Tensor:
    """Of a unit Gaussian's elements at rates of 0 to 6 bits: [7] float64."""
    return torch.tensor((1.0, *SQUARED_ERRORS), dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class RateOption:
    """One way to keep the keys, or the values, of one layer, of which the rates are to be allocated.

    scheme: without counts. kv_heads: of the layer. costs: [units] float64, of leaving a unit out in all heads, dearest first.
    tokens: over which tables are counted, as many as layers store on average. counted_tokens: stored by this layer, of 32,768.
    """

    scheme: Scheme
    kv_heads: int
    costs: Tensor
    tokens: float = REFERENCE_TOKENS
    counted_tokens: int = REFERENCE_TOKENS

    @property
    def elements(self) -> int:
        """Of a token."""
        return self.kv_heads * UNIT * len(self.costs)

    def with_counts(self, rates: Tensor) -> Scheme:
        """The scheme with these rates of units [units]."""
        counts = torch.bincount(rates, minlength=MOST_RATE + 1).tolist()
        return self.scheme.with_settings(
            counts=tuple(counts), bits=sum(k * count for k, count in enumerate(counts)) / len(rates)
        )

    @functools.cached_property
    def bits(self) -> tuple[Tensor, float]:
        """Bits of each token: of a unit by its rate [7] float64, and those that do not depend on rates."""
        heads, fraction = self.kv_heads, self.scheme.outliers.fraction
        first, further = self._table_bits
        with_codes = further + 8 * OUTLIER_BYTES * fraction * UNIT * heads
        rates = torch.arange(MOST_RATE + 1, dtype=torch.float64, device="cpu")
        fixed = first - further + heads * (8 * self.scheme.quantization.token_norm + OFFSET_BITS * (fraction > 0))
        return rates * UNIT * heads + (rates > 0) * with_codes, fixed

    def stored_bits(self, rates: Tensor, bits: float) -> float:
        """What is stored at 32,768 tokens with these rates, which take `bits` of each token."""
        first, further = self._table_bits
        tables = first + further * (int(rates.count_nonzero()) - 1)
        return (bits - tables) * self.counted_tokens + tables * self.tokens

    @functools.cached_property
    def _table_bits(self) -> tuple[float, float]:
        """Bits of tables for each token: where one unit has codes, and of each further one that has."""
        units = len(self.costs)
        sizes = []
        for coded in (1, units):
            rates = torch.tensor([1] * coded + [0] * (units - coded), dtype=torch.int64, device="cpu")
            forms = TrellisQuantizer.forms(self.with_counts(rates), self.kv_heads, UNIT * units)
            sizes.append(8 * sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in forms.values()) / self.tokens)
        return sizes[0], (sizes[1] - sizes[0]) / max(units - 1, 1)


def allocate_rates(menus: Sequence[Sequence[RateOption]], budget: float, overhead: float = 0.0) -> list[Scheme]:
    """Which option of each menu to take, with which rates, so that the sum of costs is least and that of bits within a budget.

    budget: bits for each element of all that is stored at 32,768 tokens, where layers with a sliding window store fewer;
    `overhead` of them are taken by something else. One price of a token's bit holds for all units, so what is allocated lies
    on the convex hull of what can be, and layers with a window are not spoiled because they store little at last. The dearest
    unit of each tensor has codes. Raises RecipeError where even the smallest allocation exceeds the budget.
    """
    highest = max(float(option.costs.max()) for menu in menus for option in menu)
    low, high = 1e-18 * highest, max(2 * highest, torch.finfo(torch.float32).tiny)
    taken, least = _at_price(menus, high, overhead)
    if least > budget:
        raise too_small(budget, least)
    for _ in range(HALVINGS):
        price = (low * high) ** 0.5
        found, used = _at_price(menus, price, overhead)
        if used > budget:
            low = price
        else:
            high, taken = price, found
    return [option.with_counts(rates) for option, rates in taken]


def too_small(budget: float, least: float) -> RecipeError:
    """What is raised where even the smallest allocation, of `least` bits, exceeds the budget."""
    return RecipeError(
        f"a budget of {budget:g} bits is too small for this model, on which {least:.3f} is the least; allow more."
    )


def _at_price(
    menus: Sequence[Sequence[RateOption]], price: float, overhead: float
) -> tuple[list[tuple[RateOption, Tensor]], float]:
    """What is best where a bit of each token costs `price`, with its rates, and what that takes of each stored element."""
    taken, stored = [], 0.0
    for menu in menus:
        _, option, rates, used = min((_best_rates(option, price) for option in menu), key=lambda part: part[0])
        taken.append((option, rates))
        stored += used
    return taken, stored / sum(menu[0].elements * menu[0].counted_tokens for menu in menus) + overhead


def _best_rates(option: RateOption, price: float) -> tuple[float, RateOption, Tensor, float]:
    """Cost with the price of its bits, the option with its rates, and the bits of all that is stored at 32,768 tokens."""
    bits, fixed = option.bits
    priced = option.costs.cpu().double()[:, None] * squared_errors() + price * bits
    priced[0, 0] = torch.inf
    least = priced.min(1)
    cost = float(least.values.sum()) + price * fixed
    rates = least.indices
    return cost, option, rates, option.stored_bits(rates, float(bits[rates].sum()) + fixed)
