"""Which calibrations and models the plug-in takes; vLLM need not be installed."""

from types import SimpleNamespace

import pytest
import torch

from narrowkv import Calibration, get_recipe, load_model
from narrowkv.calibration import Fingerprint
from narrowkv.errors import CalibrationError, FileFormatError, RecipeError, UnsupportedModelError
from narrowkv.vllm import VARIABLE, plugin, tables
from narrowkv.vllm.tables import calibration, quantizers, require_model, require_plain, rope_of
from tests.stream_cases import ROPES, quantizer

HEADS, DIM, LAYERS = 2, 64, 3


@pytest.fixture(autouse=True)
def read_anew():
    yield
    calibration.cache_clear()


@pytest.fixture(scope="module")
def demo():
    return load_model("narrowkv://demo", dtype="float32")[0]


def made(fingerprint, recipe="narrow3.0-equal"):
    rope = ROPES["half"](DIM)
    pairs = {i: (quantizer(HEADS, DIM, keys=True, rope=rope), quantizer(HEADS, DIM, keys=False)) for i in range(LAYERS)}
    return Calibration(get_recipe(recipe), fingerprint, pairs, dict.fromkeys(pairs, (HEADS, DIM)))


@pytest.fixture
def named(monkeypatch, demo):
    """A calibration of streams, named to the plug-in."""
    found = made(Fingerprint.of(demo))
    monkeypatch.setenv(VARIABLE, "tables")
    monkeypatch.setattr(Calibration, "from_pretrained", classmethod(lambda cls, name: found))
    return found


def test_nothing_is_registered_without_a_calibration(monkeypatch):
    """Else vLLM, which is not installed here, would be imported."""
    monkeypatch.delenv(VARIABLE, raising=False)
    assert plugin.register() is None


def test_a_folder_without_a_calibration_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(FileFormatError):
        calibration()


def test_layers_of_different_size_are_refused(named):
    named.layers[1] = (named.layers[1][0], quantizer(HEADS, DIM, keys=False, outliers=0.0))
    assert calibration() is named  # streams are as long with outliers and without
    calibration.cache_clear()
    named.layers[1] = (named.layers[1][0], named.layers[1][0])  # without a norm
    with pytest.raises(RecipeError, match="equal-layers"):
        calibration()


def test_heads_are_shared_out_among_processes(named):
    whole = quantizers(0, 2, DIM, rank=0, ranks=1)
    for rank, head in ((0, 0), (1, 1)):
        assert torch.equal(quantizers(0, 1, DIM, rank, 2)[0].mean[0], whole[0].mean[head])
    for rank, head in ((0, 0), (1, 0), (2, 1), (3, 1)):  # more processes than heads
        assert torch.equal(quantizers(0, 1, DIM, rank, 4)[1].mean[0], whole[1].mean[head])
    with pytest.raises(CalibrationError, match="layer 7"):
        quantizers(7, 2, DIM, 0, 1)


def cosines(rope, positions=4096, scaling=1.0):
    return scaling * torch.cat(rope.cos_sin(torch.arange(positions)[None]), dim=-1)[0].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "scaling"), [("half", 1.0), ("interleaved", 1.3), ("partial", 0.7), ("none", 1.0)])
def test_the_models_rotary_embedding_is_found(name, scaling, dtype):
    rope, other = ROPES[name](DIM), ROPES["half"](16)
    keys = quantizer(HEADS, DIM, keys=True, rope=rope)
    every = [(cosines(other).to(dtype), False)]
    if rope is not None:
        every.append((cosines(rope).to(dtype), rope.interleaved))
    found = rope_of(keys, every)
    assert (found is None) == (rope is None)
    if found is not None and rope is not None:
        torch.testing.assert_close(found.inverse_frequencies, rope.inverse_frequencies)
        assert found.interleaved == rope.interleaved and found.scaling == pytest.approx(scaling, rel=2**-8)


def test_keys_that_are_rotated_otherwise_are_refused():
    rope = ROPES["half"](DIM)
    slower = type(rope)(torch.where(torch.arange(DIM // 2) > 20, rope.inverse_frequencies / 8, rope.inverse_frequencies))
    for table, interleaved in ((cosines(rope), True), (cosines(slower), False), (cosines(rope)[:, :32], False)):
        with pytest.raises(CalibrationError, match="rotates keys otherwise"):
            rope_of(quantizer(HEADS, DIM, keys=True, rope=rope), [(table, interleaved)])


def config(demo, **changed):
    return SimpleNamespace(**(demo.config.to_dict() | changed))


def test_the_model_of_the_calibration_is_served(named, demo, tmp_path):
    demo.save_pretrained(tmp_path)
    require_model(config(demo), str(tmp_path))
    assert set(dict(tables._samples(tmp_path, list(named.fingerprint.weights)))) == set(named.fingerprint.weights)


@pytest.mark.parametrize("changed", [{"model_type": "qwen2"}, {"num_hidden_layers": 5}, {"head_dim": 32}, {"vocab_size": 9}])
def test_another_model_is_refused(changed, named, demo, tmp_path):
    demo.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"another model|no tables"):
        require_model(config(demo, **changed), str(tmp_path))


def test_other_weights_are_refused(named, tmp_path):
    model = load_model("narrowkv://demo", dtype="float32")[0]
    for part in model.parameters():
        part.data.add_(0.3)
    model.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match="other weights"):
        require_model(config(model), str(tmp_path))


def test_what_is_refused_is_named():
    require_plain({"this": False})
    with pytest.raises(UnsupportedModelError, match=f"does not serve that; unset {VARIABLE}"):
        require_plain({"this": False, "that": True})
