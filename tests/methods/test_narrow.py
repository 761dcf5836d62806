"""The narrow recipes: names, budgets, and what caches of them take."""

import json

import pytest
import torch

from narrowkv import Calibration, PackedCache, calibrate, get_recipe
from narrowkv.errors import RecipeError
from narrowkv.evaluate.perplexity import filled
from narrowkv.evaluate.results import definition
from narrowkv.methods import Recipe, narrow

IDS = torch.arange(2 * 200).view(2, 200) ** 2 % 89 + 3


def test_names_say_the_budget():
    budgets = {name: get_recipe(name).search_space.budget for name in ("narrow2", "narrow3", "narrow4", "narrow2.7")}
    assert budgets == {"narrow2": 2.05, "narrow3": 3.05, "narrow4": 4.05, "narrow2.7": 2.7}
    assert [get_recipe(name).keys.outliers.fraction for name in budgets] == [0.0, 0.0025, 0.005, 0.0025]
    for name in ("narrow5", "narrow2.", "narrow", "narrow-k4", "narrow-v2", "narrow-k5-v2", "narrow-k4-v"):
        with pytest.raises(RecipeError, match="There is no recipe"):
            get_recipe(name)


def test_keys_and_values_may_have_budgets_of_their_own(tiny):
    recipe = get_recipe("narrow-k4-v2.25")
    assert recipe.search_space.budgets == (4.05, 2.25) and (
        recipe.keys.outliers.fraction,
        recipe.values.outliers.fraction,
    ) == (0.005, 0.0025)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert get_recipe("narrow-k4-v2-postrope").keys.transform.pre_rope is False
    assert narrow.of_budget(3.5, value_bits=2.25) == get_recipe("narrow-k3.5-v2.25")
    assert "value_budget" not in get_recipe("narrow3").settings()["search_space"]
    model = tiny(heads=2, kv_heads=1, head_dim=64)
    sides = calibrate(model, IDS, recipe).provenance["allocation"]["sides"]
    for side, budget in (("keys", 4.05), ("values", 2.25)):
        assert sides[side]["budget"] == budget and budget - 0.25 < sides[side]["bits"] <= budget


def test_layers_may_have_streams_of_equal_bytes(tiny, tmp_path):
    recipe = get_recipe("narrow3.3-equal")
    assert recipe == narrow.of_budget(3.3, equal_layers=True) == narrow.with_equal_layers(get_recipe("narrow3.3"))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert get_recipe("narrow-k4-v2-postrope-equal").search_space.equal_layers
    assert not {"equal_layers"} & set(get_recipe("narrow3.3").settings()["search_space"])
    with pytest.raises(RecipeError, match="take a narrow one"):
        narrow.with_equal_layers(get_recipe("nuq3.9"))
    model = tiny(heads=2, kv_heads=1, head_dim=64, layers=3)
    calibrate(model, IDS, recipe).save_pretrained(tmp_path)
    calibration = Calibration.from_pretrained(tmp_path, model)
    allocated = calibration.provenance["allocation"]
    (size,) = set(allocated["stream_bytes"].values())
    assert 3.1 < allocated["bits"] <= 3.3
    cache = PackedCache(model, calibration)
    with torch.inference_mode():
        model(IDS, past_key_values=cache)
    for layer in cache.packed:
        page = layer.store.blocks.columns[0].page
        assert page.keys.planes[0].shape[2] + page.values.planes[0].shape[2] == size


def test_two_budgets_are_for_rates():
    plain = get_recipe("nuq3.9").to_dict()
    with pytest.raises(RecipeError, match="are for trellis-coded"):
        Recipe.from_dict({**plain, "search_space": {**plain["search_space"], "value_budget": 2.0}})
    with pytest.raises(RecipeError, match="true or false"):
        Recipe.from_dict({**plain, "search_space": {**plain["search_space"], "equal_layers": 1}})
    plain = get_recipe("narrow-k4-v2").to_dict()
    with pytest.raises(RecipeError, match="number of bits above 0"):
        Recipe.from_dict({**plain, "search_space": {**plain["search_space"], "value_budget": -1}})


def test_a_definition_depends_on_what_is_set_alone():
    assert definition(get_recipe("nuq3-1%")) == "1fdb3db07851a1a4a63aaa2defc29073b19842bf00dddb5724886ccf9d5f64e2"
    assert definition(get_recipe("nuq3-1%")) != definition(get_recipe("nuq3-1%").with_options(sinks=2))
    assert get_recipe("int4").settings() == {
        "name": "int4", "keys": {"bits": 4, "datatype": "int"}, "values": {"bits": 4, "datatype": "int"}
    }  # fmt: skip


@pytest.mark.parametrize("name", ["turn", "axis", "codebook"])
def test_fields_of_an_earlier_version_are_refused(name):
    plain = get_recipe("nuq3").to_dict()
    with pytest.raises(RecipeError, match=f"A Scheme has no field {name}; `narrowkv recipes show NAME`"):
        Recipe.from_dict(plain | {"keys": plain["keys"] | {name: "layer"}})
    with pytest.raises(RecipeError, match="A Recipe has no field window"):
        Recipe.from_dict(plain | {"window": 20})


def test_rates_and_schemes_are_not_chosen_among_each_other():
    plain = get_recipe("narrow3").to_dict()
    plain["search_space"]["keys"] += (get_recipe("nuq3").to_dict()["keys"],)
    with pytest.raises(RecipeError, match="among themselves"):
        Recipe.from_dict(plain)


def test_a_cache_takes_its_budget_and_is_read_by_compiled_code(tiny):
    model = tiny(heads=2, kv_heads=1, head_dim=64)
    calibration = calibrate(model, IDS, "narrow3")
    allocated = calibration.provenance["allocation"]
    assert 2.9 < allocated["bits"] <= 3.1 and allocated["budget"] == 3.05
    cache = PackedCache(model, calibration)
    assert cache.backend.startswith("cpu")
    with torch.inference_mode():
        model(IDS, past_key_values=cache)
    for layer, pair in calibration.recipe.layers.items():
        store = cache.packed[layer].store
        for scheme, side in zip(
            (pair.keys, pair.values), (store.blocks.columns[0].page.keys, store.blocks.columns[0].page.values), strict=True
        ):
            assert side.planes[0].shape[1:] == (1, scheme.codes(64), 64)
    found = []
    for backend in ("cpu", "torch"):
        cache = PackedCache(model, calibration, backend=backend)
        with torch.inference_mode():
            model(IDS[:, :-1], past_key_values=cache)
            found.append(model(IDS[:, -1:], past_key_values=cache).logits)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sliding_window", [512, 1024])
def test_a_cache_keeps_its_budget_where_some_layers_have_a_window(tiny, sliding_window):
    """Everything counted: positions and sinks too, which weigh more where few elements are stored."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": sliding_window}
    model = tiny("qwen2", heads=2, kv_heads=1, head_dim=64, use_sliding_window=True, **layers)
    calibration = calibrate(model, IDS, "narrow3.5")
    with torch.inference_mode():
        cache = filled(model, calibration, IDS[:1], 32_768)
    assert 3.3 < cache.bits_per_element <= 3.5
    assert cache.bits_per_element == pytest.approx(calibration.provenance["allocation"]["bits"], abs=0.05)


def test_more_bits_lose_less(tiny):
    model = tiny(heads=2, kv_heads=1, head_dim=64)
    with torch.inference_mode():
        expected = model(IDS).logits.log_softmax(-1)
    lost = []
    for name in ("narrow2", "narrow3", "narrow4"):
        source = calibrate(model, IDS, name)
        with torch.inference_mode():
            found = model(IDS, past_key_values=PackedCache(model, source, strict=True)).logits.log_softmax(-1)
        lost.append((expected.exp() * (expected - found)).sum(-1).mean().item())
    assert lost[1] < 0.8 * lost[0] and lost[2] < 0.8 * lost[1]
