"""How budgets are shared: among all tensors, among those of each side, or so that all layers have equal bytes."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from narrowkv.calibration.rates import RateOption, allocate_rates, squared_errors, too_small
from narrowkv.codec import Scheme
from narrowkv.codec.scheme_parts import MOST_RATE, UNIT
from narrowkv.methods.recipe import SearchSpace

Menu = Sequence[RateOption]


def allocate_budgets(search_space: SearchSpace, menus: Sequence[Menu], overhead: float = 0.0) -> list[Scheme]:
    """Which option of each menu to take, with which rates; menus are of the keys, then of the values, of each layer.

    overhead: as `allocate_rates` has it. Raises RecipeError where a budget is too small.
    """
    allocate = _allocate_equally if search_space.equal_layers else _allocate_freely
    if search_space.value_budget is None:
        return allocate(menus, 2, search_space.budget, overhead)
    keys, values = (allocate(menus[side::2], 1, budget, overhead) for side, budget in enumerate(search_space.budgets))
    return [scheme for pair in zip(keys, values, strict=True) for scheme in pair]


def _allocate_freely(menus: Sequence[Menu], together: int, budget: float, overhead: float) -> list[Scheme]:
    return allocate_rates(menus, budget, overhead)


def _allocate_equally(menus: Sequence[Menu], together: int, budget: float, overhead: float) -> list[Scheme]:
    """The same where each layer, of which `together` menus are, has as many bytes as the others of its shape.

    Layers of each shape keep the budget among themselves.
    """
    layers = [menus[first : first + together] for first in range(0, len(menus), together)]
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, (menu, *_) in enumerate(layers):
        shapes.setdefault((menu[0].kv_heads, len(menu[0].costs)), []).append(i)
    found: dict[int, list[Scheme]] = {}
    for (kv_heads, units), alike in shapes.items():
        elements = len(alike) * together * kv_heads * UNIT * units
        schemes, used = equal_schemes([layers[i] for i in alike], (budget - overhead) * elements)
        if used / elements + overhead > budget:
            raise too_small(budget, used / elements + overhead)
        found |= zip(alike, schemes, strict=True)
    return [scheme for i in range(len(layers)) for scheme in found[i]]


def equal_schemes(layers: Sequence[Sequence[Menu]], capacity: float) -> tuple[list[list[Scheme]], float]:
    """Schemes for the menus of layers of one shape, with the most bytes of each token that are the same in all of them and
    that `capacity` has bits for; and the bits that they take, more than there is space for only where the fewest are too many.
    """
    ways = [[Filling(options) for options in product(*menus)] for menus in layers]
    picks = [torch.stack([way.costs for way in each]).argmin(0) for each in ways]
    bits = [torch.stack([way.bits for way in each]).gather(0, pick[None])[0] for each, pick in zip(ways, picks, strict=True)]
    used = torch.stack(bits).sum(0)
    fitting = (used <= capacity).nonzero().flatten().tolist()
    size = max([len(layers[0]), *(last + 1 for last in fitting[-1:])])  # a byte for each menu at least
    schemes = [each[int(pick[size - 1])].schemes(size) for each, pick in zip(ways, picks, strict=True)]
    return schemes, float(used[size - 1])


class Filling:
    """Tensors of one layer whose units get bits where these save most, a byte of each head at a time.

    bits: stored for each token with 1, 2, ... bytes. costs: the loss then. Both [units x 6] float64.
    """

    def __init__(self, options: Sequence[RateOption]):
        errors = squared_errors()
        whole = [option.costs.cpu().double() for option in options]
        saved = [costs[:, None] * -errors.diff() for costs in whole]
        taken, fixed = zip(*(option.bits for option in options), strict=True)
        wanted = [part.clone() for part in saved]
        for part in wanted:
            part[0, 0] = torch.inf  # the dearest unit of each tensor has codes
        self.options = options
        self.order = _flat(wanted).argsort(descending=True, stable=True)
        steps = [part.diff().expand(len(costs), -1) for part, costs in zip(taken, whole, strict=True)]
        self.bits = sum(fixed) + _flat(steps)[self.order].cumsum(0)
        self.costs = _flat(whole).sum() - _flat(saved)[self.order].cumsum(0)

    def schemes(self, size: int) -> list[Scheme]:
        """One for each tensor, with this many bytes in all."""
        units = [len(option.costs) for option in self.options]
        rates = torch.bincount(self.order[:size] // MOST_RATE, minlength=sum(units)).split(units)
        return [option.with_counts(part) for option, part in zip(self.options, rates, strict=True)]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])
