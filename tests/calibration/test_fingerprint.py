import pytest
import torch

from narrowkv.calibration import Fingerprint
from narrowkv.errors import CalibrationError, NarrowKVWarning


def test_contents_of_a_fingerprint(tiny):
    found = Fingerprint.of(tiny("qwen2", heads=4, kv_heads=2, head_dim=16, layers=3))
    assert (found.architecture, found.layers, found.kv_heads, found.head_dim, found.vocabulary) == ("qwen2", 3, 2, 16, 97)
    assert len(found.weights) in (19, 20) and all(len(elements) == 8 for elements in found.weights.values())
    assert "embed_tokens.weight" in found.weights


def test_a_difference_is_named(tiny):
    ours = Fingerprint.of(tiny())
    ours.check(Fingerprint.of(tiny()))
    with pytest.raises(CalibrationError, match="other weights"):
        ours.check(Fingerprint.of(tiny(seed=5)))
    other = tiny()
    for layer in other.model.layers:
        layer.self_attn.k_proj.weight.data *= 3
    with pytest.raises(CalibrationError, match=r"k_proj\.weight"):
        ours.check(Fingerprint.of(other))
    with pytest.raises(CalibrationError, match="kv_heads 2 there, 4 here"):
        ours.check(Fingerprint.of(tiny(kv_heads=4)))


def test_weights_of_few_bits_are_near_their_original(tiny):
    ours, few, other = tiny(), tiny(), tiny(seed=5)
    few.narrowkv_few_bits = other.narrowkv_few_bits = True
    for part in few.parameters():
        part.data = torch.fake_quantize_per_tensor_affine(part.data, part.abs().max().item() / 7, 0, -8, 7)
    Fingerprint.of(ours).check(Fingerprint.of(few))
    Fingerprint.of(few).check(Fingerprint.of(ours))
    with pytest.raises(CalibrationError, match="even for few bits"):
        Fingerprint.of(ours).check(Fingerprint.of(other))


class Opaque(torch.Tensor):
    """A weight in few bits, as torchao and quanto make them: floating point by name alone."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("flatten", "float", "tolist", "view"):
            raise NotImplementedError(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_the_same_model_with_other_weights_in_few_bits_or_in_adapters(tiny):
    plain, few, whole, wrapped = tiny(), tiny(), tiny(), tiny()
    for layer in few.model.layers:
        layer.self_attn.q_proj.weight = torch.nn.Parameter(layer.self_attn.q_proj.weight.data.as_subclass(Opaque))
        layer.mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
        del layer.mlp.down_proj.weight
    for layer in wrapped.model.layers:
        linear, layer.self_attn.v_proj = layer.self_attn.v_proj, torch.nn.Module()
        layer.self_attn.v_proj.base_layer = linear
        layer.self_attn.v_proj.lora_A = torch.nn.Linear(8, 8)
    for name, part in list(whole.named_parameters()):
        parent, _, own = name.rpartition(".")
        setattr(whole.get_submodule(parent), own, torch.nn.Parameter(part.data.as_subclass(Opaque)))
    for one in (few, wrapped):
        Fingerprint.of(plain).check(Fingerprint.of(one))
        Fingerprint.of(one).check(Fingerprint.of(plain))
        with pytest.raises(CalibrationError, match="other weights"):
            Fingerprint.of(tiny(seed=5)).check(Fingerprint.of(one))
    with pytest.warns(NarrowKVWarning, match="cannot be determined"):
        Fingerprint.of(plain).check(Fingerprint.of(whole))


def test_whether_the_head_is_the_embedding_makes_no_difference(tiny):
    apart, tied = tiny(), tiny()
    apart.lm_head.weight.data = apart.model.embed_tokens.weight.data.clone()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    Fingerprint.of(apart).check(Fingerprint.of(tied))
    Fingerprint.of(tied).check(Fingerprint.of(apart))
