"""What calibration captures: keys before the rotary embedding, and the gradients that a plain module hook would see."""

import pytest
import torch

from narrowkv import calibrate, calibrate_many, get_recipe
from narrowkv.errors import ActivationError, CalibrationError, RecipeError
from narrowkv.integrations.capture import capture_cache
from narrowkv.integrations.preparation import prepare


def hooked(model, ids):
    """Outputs of k_proj and v_proj and their gradients, by hooks on the modules."""
    found, handles = {}, []
    for i, layer in enumerate(model.model.layers):
        for side in ("k_proj", "v_proj"):

            def keep(module, args, output, key=(i, side)):
                output.retain_grad()
                found[key] = output

            handles.append(getattr(layer.self_attn, side).register_forward_hook(keep))
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_keys_values_and_gradients_are_those_of_the_projections(tiny, family):
    model = tiny(family)
    ids = torch.randint(2, 97, (2, 30))
    expected = hooked(model, ids)
    facts = prepare(model)
    seen = {}

    def note(key, numbers):
        return lambda gradient: seen.update({key: (numbers, gradient)})

    def listen(layer, keys, rotated, values):
        for side, numbers in (("k_proj", keys), ("v_proj", values)):
            numbers.register_hook(note((layer, side), numbers.detach()))

    model.requires_grad_(False)
    logits = model(ids, past_key_values=capture_cache(model, facts, listen)).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    assert seen.keys() == expected.keys()
    for key, (numbers, gradient) in seen.items():
        torch.testing.assert_close(numbers.transpose(1, 2).flatten(2), expected[key])
        torch.testing.assert_close(gradient.transpose(1, 2).flatten(2), expected[key].grad)


def test_calibrating_leaves_the_model_as_it_was(tiny):
    model = tiny().train()
    model.model.embed_tokens.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    calibrate(model, [torch.randint(2, 97, (1, 20))], "nuq2")
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_recipes_learned_together_are_as_learned_alone(tiny):
    model = tiny()
    batches = torch.randint(2, 97, (3, 40)).split(1)
    recipes = [
        get_recipe("nuq2"),
        get_recipe("nuq3-1%").with_options(sinks=4),
        get_recipe("nuq2-1%-qnorm"),
        get_recipe("int4"),
    ]
    for together, recipe in zip(calibrate_many(model, batches, recipes), recipes, strict=True):
        alone = calibrate(model, batches, recipe)
        assert together.recipe == alone.recipe == recipe
        for ours, theirs in zip(together.layers.values(), alone.layers.values(), strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                for name, table in mine.tensors().items():
                    torch.testing.assert_close(table, other.tensors()[name])


def test_sinks_are_left_out(tiny):
    model = tiny()
    model.model.embed_tokens.weight.data[1] *= 50  # the first token's keys and values are unlike all others
    ids = torch.randint(2, 97, (4, 40))
    ids[:, 0] = 1
    without, within = (calibrate(model, [ids], get_recipe("nuq3").with_options(sinks=n)) for n in (1, 0))
    assert (without.layers[0][0].scale <= within.layers[0][0].scale + 1e-6).all()
    assert not torch.allclose(without.layers[0][0].scale, within.layers[0][0].scale)


def test_progress_is_reported(tiny):
    calls = []
    calibrate(tiny(), torch.randint(2, 97, (3, 20)).split(1), "nuq2", on_batch=lambda *step: calls.append(step))
    assert calls == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("batches", [[], [torch.zeros(1, 0, dtype=torch.long)], [torch.zeros(1, 1, dtype=torch.long)]])
def test_too_little_text_is_refused(tiny, batches):
    with pytest.raises(CalibrationError, match="more text"):
        calibrate(tiny(), batches, "nuq2")


def test_sequences_of_nothing_but_sinks_and_layers_that_are_not_there_are_refused(tiny):
    recipe, ids = get_recipe("nuq2"), torch.randint(2, 97, (1, 8))
    with pytest.raises(CalibrationError, match="longer than the 8 sinks"):
        calibrate(tiny(), [ids], recipe.with_options(sinks=8))
    with pytest.raises(RecipeError, match=r"names layers \[-1\]"):
        calibrate(tiny(), [ids], recipe.with_options(layers={-1: recipe.schemes(0)}))


def test_calibrating_works_where_gradients_are_off(tiny):
    model, ids = tiny(), torch.randint(2, 97, (2, 40))
    expected = calibrate(model, ids, "nuq2")
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            found = calibrate(model, ids.clone(), "nuq2")
        assert torch.equal(found.layers[1][1].codebook, expected.layers[1][1].codebook)


def test_nan_activations_are_refused(tiny):
    model = tiny()
    model.model.layers[0].self_attn.k_proj.weight.data[0] = float("nan")
    with pytest.raises(ActivationError, match="NaN"):
        calibrate(model, [torch.randint(2, 97, (1, 20))], "nuq2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_calibrating_in_16_bits(tiny, dtype):
    model = tiny(dtype=dtype, initializer_range=0.1)
    with torch.inference_mode():
        calibration = calibrate(model, torch.randint(2, 97, (2, 40)), "nuq3-1%")
    assert all(
        torch.isfinite(table).all() for pair in calibration.layers.values() for q in pair for table in q.tensors().values()
    )
