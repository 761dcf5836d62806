import json
import sys

import pytest
import torch

from narrowkv import Outliers, PackedCache, Quantization, Recipe, Scheme, Transform, calibrate, get_recipe, recipe_names
from narrowkv.errors import RecipeError
from narrowkv.methods import LayerSchemes, registry


@pytest.mark.parametrize("name", recipe_names())
def test_every_name_gives_its_recipe_and_survives_json(name):
    recipe = get_recipe(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_published_names_mean_what_they_say():
    recipe = get_recipe("nuq3-1%")
    assert recipe.keys == Scheme(Quantization(3, "nuq", strategy="channel"), Transform(pre_rope=True), Outliers(0.01))
    assert recipe.values == Scheme(Quantization(3, "nuq", strategy="token"), outliers=Outliers(0.01))
    assert recipe.sinks == 1
    assert get_recipe("nuq2-0.5%").values.outliers.fraction == 0.005
    assert get_recipe("nuq2-1%-qnorm").keys.quantization.qnorm
    assert not get_recipe("int4").needs_calibration
    assert not get_recipe("int4").keys.transform.pre_rope


@pytest.mark.parametrize("name", ["nuq7", "nuq3--1%", "nuq3-5%", "int5", "kvquant", ""])
def test_impossible_names_are_refused(name):
    with pytest.raises(RecipeError):
        get_recipe(name)


def test_unknown_name_lists_what_exists():
    with pytest.raises(RecipeError, match=r"nuq3-1%.*int4"):
        get_recipe("gguf")


def test_options():
    recipe = get_recipe("nuq3-1%").with_options(sinks=5, residual_length=32)
    assert (recipe.sinks, recipe.residual_length) == (5, 32)
    with pytest.raises(RecipeError, match="has no sink;"):
        recipe.with_options(sink=5)
    for wrong in (-1, True, 1.0):
        with pytest.raises(RecipeError, match="sinks must be"):
            recipe.with_options(sinks=wrong)
    with pytest.raises(RecipeError, match="name is text"):
        recipe.with_options(name=5)


def test_values_have_no_rotary_embedding():
    scheme = Scheme(Quantization(4, "int"), Transform(pre_rope=True))
    with pytest.raises(RecipeError, match="rotary"):
        Recipe("wrong", keys=scheme, values=scheme)


def test_levels_over_a_sliding_window_need_exact_tokens_ahead():
    recipe = get_recipe("intrinsic-2-kmeans-w3")
    assert (
        recipe.keys.quantization.lookahead_blocks,
        recipe.values.quantization.lookahead_blocks,
        recipe.residual_length,
    ) == (3, 3, 128)
    assert get_recipe("intrinsic-2-w1").keys == get_recipe("intrinsic-2").keys
    with pytest.raises(RecipeError, match="residual_length 64 is too small"):
        recipe.with_options(residual_length=64)
    with pytest.raises(RecipeError, match="lookahead_blocks"):
        get_recipe("intrinsic-2-w0")


def test_layers_may_differ():
    base = get_recipe("int4")
    exact = Scheme(Quantization(16, "exact"))
    recipe = base.with_options(layers={1: LayerSchemes(exact, exact)})
    assert recipe.schemes(0).keys == base.keys
    assert recipe.schemes(1).keys == exact
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("content", ["", "[]", "{", '{"name": "x"}', '{"name": "x", "keys": {"bits": 7}, "values": {}}'])
def test_files_that_are_no_recipe_are_refused(tmp_path, content):
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(RecipeError):
        get_recipe(str(path))


def test_recipe_from_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(get_recipe("nuq2").with_options(name="mine").to_dict()))
    assert get_recipe(str(path)).name == "mine"


def test_every_preset_makes_a_cache_and_follows_the_model(tiny):
    """8 bits nearly exactly, 4 bits better than 2, whatever the method; groups that do not fill a head are refused."""
    model = tiny(heads=2, kv_heads=1, head_dim=64)
    ids = torch.randint(2, 97, (2, 200))
    with torch.inference_mode():
        expected = model(ids).logits.log_softmax(-1)
    loss = {}
    for name in recipe_names():
        recipe = get_recipe(name)
        source = calibrate(model, ids, recipe) if recipe.needs_calibration else recipe
        with torch.inference_mode():
            found = model(ids, past_key_values=PackedCache(model, source, strict=True)).logits.log_softmax(-1)
        loss[name] = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert loss["fp16"] == pytest.approx(0, abs=1e-5)
    assert loss["int8"] < 0.1 * loss["int4"] and loss["fp8"] < loss["fp4"]
    assert loss["nvfp4"] < loss["int3"] and loss["smooth-int8"] < 0.1 * loss["smooth-int4"]
    for method in ("int{}", "nf{}", "int{}-head", "nuq{}", "nuq{}-1%", "kivi-{}", "hadamard-int{}"):
        assert loss[method.format(4)] < 0.6 * loss[method.format(2)], method
    assert loss["intrinsic-2-nearest-kmeans"] < loss["intrinsic-2-kmeans"]
    with pytest.raises(RecipeError, match="do not fill a head_dim of 16"):
        PackedCache(tiny(), "fp4")


def test_learned_keys_go_with_values_that_need_no_calibration(tiny):
    model, ids = tiny(), torch.randint(2, 97, (2, 100))
    for name in ("nvfp4", "intrinsic-2-nearest"):
        recipe = get_recipe("nuq4").with_options(name="mixed", values=get_recipe(name).values)
        calibration = calibrate(model, ids, recipe)
        cache = PackedCache(model, calibration)
        with torch.inference_mode():
            assert model(ids, past_key_values=cache).logits.isfinite().all()
        assert 4 < cache.bits_per_element < 16


@pytest.mark.parametrize("name", ["sinks", "residual_length"])
@pytest.mark.parametrize("count", [-1, 10**9, 10**30, 1.0, True, None])
def test_counts_are_bounded(name, count):
    with pytest.raises(RecipeError, match=f"{name} must be an integer"):
        get_recipe("int4").with_options(**{name: count})


def test_groups_spans_caps_layers_and_budgets_are_bounded():
    plain = get_recipe("int4").to_dict()
    for keys in (
        {"group_size": 10**30, "strategy": "token_head"},
        {"outliers": 0.01, "outlier_cap": 10**30},
        {"lookahead_blocks": 10**30},
    ):
        with pytest.raises(RecipeError, match="integer"):
            Recipe.from_dict(plain | {"keys": plain["keys"] | keys})
    with pytest.raises(RecipeError, match="Layers are numbered"):
        Recipe.from_dict(plain | {"layers": {str(10**9): {"keys": plain["keys"], "values": plain["values"]}}})
    for budget in (0, 10**400, float("inf"), float("nan")):
        with pytest.raises(RecipeError, match="budget"):
            Recipe.from_dict(
                plain | {"search_space": {"budget": budget, "keys": [plain["keys"]], "values": [plain["values"]]}}
            )


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000, "[]", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_file_without_a_recipe_raises_an_error(tmp_path, content):
    path = tmp_path / "recipe.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match="recipe"):
        get_recipe(str(path))
    with pytest.raises(RecipeError, match="Cannot read"):
        get_recipe("a\0b.json")


@pytest.mark.parametrize("given", [4, None, ["int4"], {"name": "int4"}])
def test_what_is_no_recipe_is_named(given):
    with pytest.raises(RecipeError, match="Expected a recipe or its name"):
        get_recipe(given)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a module of some code as the recipes of another package."""

    def install(code):
        (tmp_path / "others_recipes.py").write_text(code)
        (tmp_path / "others-1.0.dist-info").mkdir()
        (tmp_path / "others-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
        (tmp_path / "others-1.0.dist-info" / "entry_points.txt").write_text("[narrowkv.recipes]\nothers = others_recipes\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        registry.methods_of_others.cache_clear()

    yield install
    sys.modules.pop("others_recipes", None)
    registry.methods_of_others.cache_clear()


OTHERS = """
from narrowkv import Quantization, Recipe, Scheme
NAMES = ("others-5",)
def recipe(name):
    keys, values = Scheme(Quantization(8, "int")), Scheme(Quantization(2, "int"))
    return Recipe(name, keys=keys, values=values) if name in ("others-5", "int4") else None
"""


def test_another_package_adds_recipes_but_none_of_our_names(installed):
    installed(OTHERS)
    assert recipe_names()[-1] == "others-5"
    assert get_recipe("others-5").keys.bits == 8
    assert get_recipe("int4").keys.bits == 4


@pytest.mark.parametrize("code", ["import does_not_exist", "NAMES = ()"])
def test_a_broken_package_is_named_and_leaves_our_recipes_alone(installed, code):
    installed(code)
    assert get_recipe("int4").name == "int4"
    with pytest.raises(RecipeError, match="recipes others of another package"):
        recipe_names()
    with pytest.raises(RecipeError, match="uninstall it"):
        get_recipe("others-5")
