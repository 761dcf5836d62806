"""Rate allocation: within its budget, and the best that one price of a bit can do."""

import itertools

import pytest
import torch

from narrowkv.calibration.rates import RateOption, allocate_rates, mean_counted_tokens
from narrowkv.codec import Outliers, Quantization, Scheme, Transform, TrellisQuantizer
from narrowkv.codec.gaussian_tables import SQUARED_ERRORS
from narrowkv.errors import RecipeError

KEYS = Scheme(Quantization(3, "trellis", strategy="channel"), Transform(pre_rope=True))
VALUES = [
    Scheme(Quantization(3, "trellis", strategy="channel", token_norm=True), Transform(learned_rotation=learned_rotation))
    for learned_rotation in (True, False)
]


def bits_of(option, scheme):
    """Bits of a token, counted again: codes, tables, norms, outliers."""
    units, heads = len(option.costs), option.kv_heads
    forms = TrellisQuantizer.forms(scheme, heads, 8 * units).values()
    tables = 8 * sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in forms) / option.tokens
    exact = 32 * scheme.outliers.fraction * scheme.outlier_positions(8 * units) * heads + (
        0.5 * heads if scheme.outliers.fraction else 0
    )
    return 8 * heads * scheme.codes(8 * units) + tables + exact


def cost_of(option, scheme):
    rates = torch.tensor([rate for rate in range(6, -1, -1) for _ in range(scheme.quantization.counts[rate])])
    return float((option.costs * torch.tensor((1.0, *SQUARED_ERRORS), dtype=torch.float64)[rates]).sum())


@pytest.mark.parametrize("budget", [1.5, 2.05, 3.3, 4.5])
@pytest.mark.parametrize("outliers", [0.0, 0.005])
def test_a_budget_is_kept_and_nearly_used(budget, outliers):
    keys = Scheme(Quantization(3, "trellis", strategy="channel"), Transform(pre_rope=True), Outliers(outliers))
    costs = [torch.rand(16, dtype=torch.float64).exp().sort(descending=True).values * scale for scale in (1, 40, 0.1)]
    menus = [[RateOption(keys, 2, cost)] for cost in costs]
    schemes = allocate_rates(menus, budget, 0.02)
    used = sum(bits_of(menu[0], scheme) for menu, scheme in zip(menus, schemes, strict=True)) / (3 * 2 * 128) + 0.02
    assert budget - 0.1 < used <= budget + 1e-9
    spent = [scheme.bits for scheme in schemes]
    assert spent[1] > spent[0] > spent[2]
    assert all(scheme.bits == sum(k * c for k, c in enumerate(scheme.quantization.counts)) / 16 for scheme in schemes)


def test_no_other_rates_cost_less_at_as_many_bits():
    option = RateOption(KEYS, 1, torch.tensor([50.0, 9.0, 3.0], dtype=torch.float64))
    (found,) = allocate_rates([[option]], 3.0)
    for rates in itertools.product(range(7), repeat=3):
        if rates[0] and list(rates) == sorted(rates, reverse=True):
            other = option.with_counts(torch.tensor(rates))
            fewer = bits_of(option, other) <= bits_of(option, found) + 1e-9
            assert not fewer or cost_of(option, other) >= cost_of(option, found) * (1 - 1e-9)


def test_a_rotation_is_chosen_where_many_tokens_share_its_table():
    costs = [torch.logspace(2, -3, 32, dtype=torch.float64), torch.logspace(2, -1, 32, dtype=torch.float64)]
    for tokens, learned_rotation in ((32_768, True), (512, False)):
        menu = [RateOption(scheme, 1, cost, tokens) for scheme, cost in zip(VALUES, costs, strict=True)]
        (found,) = allocate_rates([menu], 3.0)
        assert found.transform.learned_rotation == learned_rotation


def test_a_budget_is_of_all_that_is_stored():
    """However dear a layer with a short window is, which stores a sixtieth of what another does."""
    costs = torch.logspace(2, -1, 16, dtype=torch.float64)
    for stored in ((32_768, 512), (512, 32_768)):
        tokens = mean_counted_tokens((count, 128) for count in stored)
        options = [RateOption(KEYS, 1, costs * scale, tokens, count) for scale, count in zip((300, 1), stored, strict=True)]
        schemes = allocate_rates([[option] for option in options], 3.0)
        bits = [bits_of(option, scheme) for option, scheme in zip(options, schemes, strict=True)]
        rates = [torch.arange(7).repeat_interleave(torch.tensor(scheme.quantization.counts)) for scheme in schemes]
        assert bits[0] > bits[1]
        allocated = sum(option.stored_bits(*part) for option, *part in zip(options, rates, bits, strict=True))
        assert 2.7 < allocated / (128 * sum(stored)) <= 3.0


def test_every_tensor_keeps_codes():
    menus = [[RateOption(KEYS, 1, torch.full((4,), cost, dtype=torch.float64))] for cost in (1e9, 1e-9, 0.0)]
    assert all(sum(scheme.quantization.counts[1:]) for scheme in allocate_rates(menus, 2.0))


def test_a_budget_too_small_is_refused():
    menu = [RateOption(KEYS, 1, torch.ones(2, dtype=torch.float64))]
    with pytest.raises(RecipeError, match=r"a budget of 0\.2 bits is too small"):
        allocate_rates([menu], 0.2)
