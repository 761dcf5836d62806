"""What calibration captures: keys before the rotary embedding, and the gradients that a plain module hook would see."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from narrowkv import calibrate, calibrate_many, get_recipe
from narrowkv.errors import ActivationError, CalibrationError, NarrowKVWarning, RecipeError
from narrowkv.integrations.calibrator import draw_tokens, fits_for, observe_layers, observer_cache
from narrowkv.integrations.preparation import model_info_for, prepare


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
    info = prepare(model)
    seen = {}

    def note(key, elements):
        return lambda gradient: seen.update({key: (elements, gradient)})

    def listen(layer, keys, rotated, values, rope_state):
        for side, elements in (("k_proj", keys), ("v_proj", values)):
            elements.register_hook(note((layer, side), elements.detach()))

    model.requires_grad_(False)
    logits = model(ids, past_key_values=observer_cache(model, info, listen)).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    assert seen.keys() == expected.keys()
    for key, (elements, gradient) in seen.items():
        torch.testing.assert_close(elements.transpose(1, 2).flatten(2), expected[key])
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
        get_recipe("narrow3"),
    ]
    for together, recipe in zip(calibrate_many(model, batches, recipes), recipes, strict=True):
        alone = calibrate(model, batches, recipe)
        assert together.recipe == alone.recipe and (recipe.search_space or recipe == alone.recipe)
        for ours, theirs in zip(together.layers.values(), alone.layers.values(), strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                for name, table in mine.tensors().items():
                    torch.testing.assert_close(table, other.tensors()[name])


def test_gradients_of_drawn_tokens_depend_on_sequences_alone(tiny):
    """Tokens drawn are those of a sequence, however it is batched; their gradients come in addition to those of the text."""
    model, ids, recipe = tiny(), torch.randint(2, 97, (4, 30)), get_recipe("narrow3")
    moments = []
    for batches in (ids.split(1), ids.flip(0).split(4)):
        fits = [fits_for(layer_info, [recipe]) for layer_info in model_info_for(model, "auto", [recipe]).attention]
        for drawn in (True, False):
            observe_layers(
                model,
                model_info_for(model, "auto", [recipe]),
                batches,
                lambda layer, *elements, fits=fits: fits[layer].observe_codebook(*elements),
                gradients=True,
                drawn=drawn,
            )
            moments.append([fit.samples for layer in fits for fit in layer.fits.values()])
        assert all(sample.gradients == 3 * sample.tokens / 2 == 3 * 4 * 29 for sample in moments[-1])
    for one, other in zip(moments[0], moments[2], strict=True):
        torch.testing.assert_close(one.moment, other.moment, rtol=1e-4, atol=1e-4 * float(one.moment.abs().max()))


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


IDS = torch.randint(2, 97, (3, 30), generator=torch.Generator().manual_seed(1))
PADDED = {"input_ids": torch.nn.functional.pad(IDS, (4, 3)), "attention_mask": torch.nn.functional.pad(IDS * 0 + 1, (4, 3))}
RAGGED = [IDS[0, :20].tolist(), IDS[1].tolist()]


@pytest.mark.parametrize(
    ("given", "alike"),
    [
        (IDS.int(), IDS),
        (IDS.numpy(), IDS),
        (IDS.numpy().astype(np.uint16), IDS),
        (IDS.tolist(), IDS),
        (IDS[0].tolist(), IDS[:1]),
        (IDS[0], IDS[:1]),
        ({"input_ids": IDS}, IDS),
        ({"input_ids": IDS.tolist()}, IDS),
        ([{"input_ids": row.tolist()} for row in IDS], IDS),
        (DataLoader([{"input_ids": row, "labels": row} for row in IDS], batch_size=2), [IDS[:2], IDS[2:]]),
        (DataLoader(IDS, batch_size=2), [IDS[:2], IDS[2:]]),
        (RAGGED, [IDS[:1, :20], IDS[1:2]]),
        ({"input_ids": RAGGED, "attention_mask": [[1] * 20, [1] * 30]}, [IDS[:1, :20], IDS[1:2]]),
        (PADDED, IDS),
        ([PADDED], IDS),
        ((row[None] for row in IDS), IDS),
        ([row.numpy() for row in IDS], IDS),
    ],
    ids=lambda part: type(part).__name__,
)
def test_token_ids_of_tokenizers_and_loaders_are_accepted(tiny, given, alike):
    model = tiny()
    found, expected = calibrate(model, given, "nuq2"), calibrate(model, alike, "nuq2")
    assert found.provenance == expected.provenance
    for pair, other in zip(found.layers.values(), expected.layers.values(), strict=True):
        for quantizer, alike_quantizer in zip(pair, other, strict=True):
            for name, table in quantizer.tensors().items():
                torch.testing.assert_close(table, alike_quantizer.tensors()[name])


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ("a text", "not str"),
        (["a text", "and another"], "A batch is str"),
        (None, "not NoneType"),
        (7, "not int"),
        ([IDS, None], "A batch is NoneType"),
        ({"inputs": IDS}, "has inputs, but no `input_ids`"),
        ([{"input_ids": "text"}], "A batch is str"),
        (IDS.float(), "integers, and a batch has torch.float32"),
        ([[True, False]], "integers, and a batch has torch.bool"),
        (IDS[None], r"the shape \(1, 3, 30\)"),
        (IDS + 97, "from 0 to 96 for this model"),
        (IDS - 60, "from 0 to 96 for this model, and a batch has -"),
        ({"input_ids": IDS, "attention_mask": IDS[:1]}, "covers 30 of 90 tokens"),
        ([IDS[0, :1].tolist()], "more text"),
    ],
    ids=str,
)
def test_what_is_no_token_ids_is_one_sentence(tiny, given, cause):
    with pytest.raises(CalibrationError, match=cause):
        calibrate(tiny(), given, "nuq2")


def test_a_model_without_gradients_raises(tiny):
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    for recipe in ("nuq3", "narrow3"):
        with pytest.raises(CalibrationError, match="No gradient of the loss comes back"):
            calibrate(model, IDS, recipe)
    assert calibrate(model, IDS, "int4-channel").layers[0][0].scale is not None  # which needs no gradient


def test_a_model_that_detaches_the_attention_output_is_refused_for_gradients(tiny):
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(CalibrationError, match="No gradient of the loss comes back"):
        calibrate(model, IDS, "nuq3")


def test_few_dominating_tokens_raise_a_warning(tiny):
    model, ids = tiny(initializer_range=0.05), torch.randint(2, 97, (2, 300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, ids, "nuq3")
    layer = model.model.layers[1].self_attn.v_proj
    loud = torch.zeros(300, 1)
    loud[40] = 1  # one token's value reaches all that follow, the others' next to nothing
    layer.register_forward_hook(lambda module, inputs, output: output * (1e-3 + 1e3 * loud))
    with pytest.warns(NarrowKVWarning, match=r"9\d% for the keys of layer 1.*--no-bos") as device_lengths:
        calibrate(model, ids, "nuq3")
    assert len(device_lengths) == 1


def test_a_prediction_worse_than_guessing_warns(tiny):
    model, ids = tiny(), torch.randint(2, 97, (2, 60))
    model.lm_head.weight.data *= 300  # every error costs hundreds of nats
    with pytest.warns(NarrowKVWarning, match=r"nuq2\.9 is predicted to lose .* blind guessing loses 4\.57"):
        calibrate(model, ids, "nuq2.9")


@pytest.mark.parametrize("batches", [[], [torch.zeros(1, 0, dtype=torch.long)], [torch.zeros(1, 1, dtype=torch.long)]])
def test_too_little_text_is_refused(tiny, batches):
    with pytest.raises(CalibrationError, match="more text"):
        calibrate(tiny(), batches, "nuq2")


def test_sequences_of_nothing_but_sinks_and_layers_that_are_not_there_are_refused(tiny):
    recipe, ids = get_recipe("nuq2"), torch.randint(2, 97, (1, 8))
    with pytest.raises(CalibrationError, match="longer than the 8 sinks"):
        calibrate(tiny(), [ids], recipe.with_options(sinks=8))
    with pytest.raises(RecipeError, match=r"names layers \[7\]"):
        calibrate(tiny(), [ids], recipe.with_options(layers={7: recipe.schemes(0)}))


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


def test_tokens_are_drawn_as_often_as_the_model_predicts_them():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = draw_tokens(probabilities.expand(20_000, 5), torch.arange(20_000))
    assert torch.allclose(drawn.bincount(minlength=5) / 20_000, probabilities, atol=0.015)
    certain = torch.eye(5)[:, [3, 4, 0, 1, 2]]
    assert draw_tokens(certain, torch.arange(5)).tolist() == certain.argmax(1).tolist()
