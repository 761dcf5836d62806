"""The choice of schemes under a budget, against trying all."""

import itertools

import pytest
import torch

from narrowkv.calibration.allocation import Option, allocate, measure
from narrowkv.calibration.fit import Fit
from narrowkv.calibration.samples import Samples
from narrowkv.codec import Outliers, Quantization, Scheme
from narrowkv.errors import RecipeError
from narrowkv.store import LayerStore


@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_is_better(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(4, 5, 2, generator=generator).tolist()
    menus = [[Option(Scheme(Quantization(4, "int")), 2 + 3 * bits, cost) for bits, cost in menu] for menu in draw]
    budget = 13.0
    picks = allocate(menus, budget)
    fitting = [
        sum(option.cost for option in options)
        for options in itertools.product(*menus)
        if sum(option.bits for option in options) <= budget
    ]
    chosen = [menu[pick] for menu, pick in zip(menus, picks, strict=True)]
    assert sum(option.bits for option in chosen) <= budget
    assert sum(option.cost for option in chosen) == pytest.approx(min(fitting), rel=1e-3)


def test_a_budget_that_nothing_fits_is_refused():
    with pytest.raises(RecipeError, match=r"5\.9 bits is too small.*6\.000"):
        allocate([[Option(Scheme(Quantization(4, "int")), 3.0, 1.0)]] * 2, 5.9)


@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_bits_are_those_of_the_store(outliers):
    scheme = Scheme(Quantization(3, "nuq", strategy="channel"), outliers=Outliers(outliers))
    fit, samples, elements = Fit(scheme), Samples(), torch.randn(3000, 2, 16)
    fit.observe_range(elements), fit.observe_codebook(elements, None), samples.add(elements, None)
    quantizer = fit.quantizer((2, 16), scheme)
    option = measure(quantizer, samples, keys=True)
    store = LayerStore(quantizer, quantizer)
    for _ in range(16):
        elements = torch.randn(1, 2, 2048, 16)
        store.append(elements, elements)
    allocated = [tensor for page in store.blocks.pages() for tensor in (*page.keys.planes, *page.keys.outliers())]
    tables = sum(table.nbytes for table in quantizer.tensors().values())
    assert option.bits == pytest.approx(8 * (sum(tensor.nbytes for tensor in allocated) + tables) / 32768, rel=0.05)
