"""Equal bytes in all layers: within the budget, as many as it has space for, and placed where they save most."""

import itertools

import pytest
import torch
from tests.calibration.test_rates import KEYS, VALUES, bits_of, cost_of

from narrowkv.calibration.rates import RateOption
from narrowkv.calibration.shares import Filling, allocate_budgets, equal_schemes
from narrowkv.errors import RecipeError
from narrowkv.methods import get_recipe


def menus(scales, units=8, kv_heads=2, tokens=32_768):
    """Of the keys and the values of a layer for each scale of costs."""
    costs = [torch.rand(2, units, dtype=torch.float64).exp().sort(descending=True).values * scale for scale in scales]
    return [
        part
        for keys, values in costs
        for part in (
            [RateOption(KEYS, kv_heads, keys, tokens)],
            [RateOption(scheme, kv_heads, values, tokens) for scheme in VALUES],
        )
    ]


def taken(menu, scheme):
    """True bits of a token in a layer's tensor."""
    return next(
        bits_of(option, scheme)
        for option in menu
        if option.scheme.transform.learned_rotation == scheme.transform.learned_rotation
    )


@pytest.mark.parametrize("budget", [1.5, 2.05, 3.3])
def test_layers_of_one_shape_have_equal_bytes_within_the_budget(budget):
    layers = [*menus((1, 40, 0.1)), *menus((3, 5), units=5, kv_heads=1)]
    search_space = get_recipe(f"narrow{budget}-equal").search_space
    schemes = allocate_budgets(search_space, layers, 0.02)
    for first, last, units, kv_heads in ((0, 6, 8, 2), (6, 10, 5, 1)):
        pairs = zip(schemes[first:last:2], schemes[first + 1 : last : 2], strict=True)
        (size,) = {round(units * (keys.bits + values.bits)) for keys, values in pairs}
        elements = (last - first) * kv_heads * 8 * units
        used = sum(taken(*part) for part in zip(layers[first:last], schemes[first:last], strict=True)) / elements + 0.02
        assert budget - 0.1 - 4 / units < used <= budget and size > 1


def test_each_side_keeps_a_budget_of_its_own():
    layers = menus((1, 40, 0.1))
    schemes = allocate_budgets(get_recipe("narrow-k4.1-v2.2-equal").search_space, layers, 0.02)
    for side, budget in ((0, 4.1), (1, 2.2)):
        assert len({scheme.bits for scheme in schemes[side::2]}) == 1
        used = sum(taken(*part) for part in zip(layers[side::2], schemes[side::2], strict=True)) / (3 * 2 * 64) + 0.02
        assert budget - 0.2 < used <= budget


def test_no_other_rates_of_as_many_bytes_cost_less():
    layer = menus((3,), units=3)
    ((keys, values),), used = equal_schemes([layer], 1300.0)
    size = round(3 * (keys.bits + values.bits))
    assert used <= 1300 and size > 2

    def cheapest(menu):
        rates = [r for r in itertools.product(range(7), repeat=3) if r[0] and list(r) == sorted(r, reverse=True)]
        every = [(sum(r), cost_of(option, option.with_counts(torch.tensor(r)))) for option in menu for r in rates]
        return {total: min(cost for other, cost in every if other == total) for total, _ in every}

    key_bias, of_values = map(cheapest, layer)
    best = min(key_bias[one] + of_values[size - one] for one in key_bias if size - one in of_values)
    found = cost_of(layer[0][0], keys) + cost_of(layer[1][0], values)
    assert found == pytest.approx(best)


def test_bits_and_costs_of_every_size_are_those_of_its_schemes():
    options = [menu[0] for menu in menus((1,), units=4)]
    filling = Filling(options)
    for size in range(2, 2 * 4 * 6 + 1):
        schemes = filling.schemes(size)
        assert sum(4 * scheme.bits for scheme in schemes) == size
        pairs = list(zip(options, schemes, strict=True))
        assert float(filling.bits[size - 1]) == pytest.approx(sum(bits_of(*pair) for pair in pairs))
        assert float(filling.costs[size - 1]) == pytest.approx(sum(cost_of(*pair) for pair in pairs))


def test_a_budget_too_small_is_refused():
    with pytest.raises(RecipeError, match=r"a budget of 0\.1 bits is too small for this model, on which"):
        allocate_budgets(get_recipe("narrow0.1-equal").search_space, menus((1, 2)))
