"""Rate allocation: how many bits each unit of 8 coefficients of each tensor has, under one budget for the whole cache."""

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

    def bits(self) -> tuple[Tensor, float]:
        """Bits of each token: of a unit by its rate [7] float64, and those that do not depend on rates."""
        units, heads = len(self.costs), self.kv_heads
        one, all_units = (
            self._table_bits(torch.tensor([1] * coded + [0] * (units - coded), dtype=torch.int64, device="cpu"))
            for coded in (1, units)
        )
        with_codes = (all_units - one) / max(units - 1, 1) + 8 * OUTLIER_BYTES * self.scheme.outliers.fraction * UNIT * heads
        rates = torch.arange(MOST_RATE + 1, dtype=torch.float64, device="cpu")
        fixed = one - (all_units - one) / max(units - 1, 1) + heads * (8 * self.scheme.quantization.token_norm)
        return rates * UNIT * heads + (rates > 0) * with_codes, fixed + heads * OFFSET_BITS * (
            self.scheme.outliers.fraction > 0
        )

    def stored_bits(self, rates: Tensor, bits: float) -> float:
        """What is stored at 32,768 tokens with these rates, which take `bits` of each token."""
        tables = self._table_bits(rates)
        return (bits - tables) * self.counted_tokens + tables * self.tokens

    def _table_bits(self, rates: Tensor) -> float:
        forms = TrellisQuantizer.forms(self.with_counts(rates), self.kv_heads, UNIT * len(rates))
        size = sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in forms.values())
        return 8 * size / self.tokens


def allocate_rates(menus: Sequence[Sequence[RateOption]], budget: float, overhead: float = 0.0) -> list[Scheme]:
    """Which option of each menu to take, with which rates, so that the sum of costs is least and that of bits within a budget.

    budget: bits for each element of all that is stored at 32,768 tokens, where layers with a sliding window store fewer;
    `overhead` of them are taken by something else. One price of a token's bit holds for all units, so what is allocated lies
    on the convex hull of what can be, and layers with a window are not spoiled because they store little at last. The dearest
    unit of each tensor has codes. Raises RecipeError where even the smallest allocation exceeds the budget.
    """
    highest = max(float(option.costs.max()) for menu in menus for option in menu)
    low, high = 1e-18 * highest, max(2 * highest, torch.finfo(torch.float32).tiny)
    schemes, least = _at_price(menus, high, overhead)
    if least > budget:
        raise too_small(budget, least)
    for _ in range(HALVINGS):
        price = (low * high) ** 0.5
        found, used = _at_price(menus, price, overhead)
        if used > budget:
            low = price
        else:
            high, schemes = price, found
    return schemes


def too_small(budget: float, least: float) -> RecipeError:
    """What is raised where even the smallest allocation, of `least` bits, exceeds the budget."""
    return RecipeError(
        f"a budget of {budget:g} bits is too small for this model, on which {least:.3f} is the least; allow more."
    )


def _at_price(menus: Sequence[Sequence[RateOption]], price: float, overhead: float) -> tuple[list[Scheme], float]:
    """What is best where a bit of each token costs `price`, and what that takes of each element that is stored."""
    schemes, stored = [], 0.0
    for menu in menus:
        _, scheme, used = min((_best_rates(option, price) for option in menu), key=lambda part: part[0])
        schemes.append(scheme)
        stored += used
    return schemes, stored / sum(menu[0].elements * menu[0].counted_tokens for menu in menus) + overhead


def _best_rates(option: RateOption, price: float) -> tuple[float, Scheme, float]:
    """Cost with the price of its bits, the scheme with its rates, and the bits of all that is stored at 32,768 tokens."""
    bits, fixed = option.bits()
    errors = squared_errors()
    costs = option.costs.cpu().double()[:, None] * errors
    priced = costs + price * bits
    priced[0, 0] = torch.inf
    rates = priced.argmin(1)
    cost = float(priced.gather(1, rates[:, None]).sum()) + price * fixed
    return cost, option.with_counts(rates), option.stored_bits(rates, float(bits[rates].sum()) + fixed)
