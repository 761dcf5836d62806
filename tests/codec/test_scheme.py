import json
from dataclasses import fields

import pytest

from narrowkv.codec import Outliers, Quantization, Scheme, Transform
from narrowkv.errors import RecipeError


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"bits": 7, "datatype": "nuq"}, "7 bits"),
        ({"bits": 16, "datatype": "nuq"}, "16 bits"),
        ({"bits": True, "datatype": "int"}, "bits"),
        ({"bits": 3.0, "datatype": "int"}, "bits"),
        ({"bits": 3, "datatype": "int", "outliers": 0.01, "outlier_cap": 1.5}, "cap"),
        ({"bits": 3, "datatype": "int", "pre_rope": "false"}, "pre_rope"),
        ({"bits": 3, "datatype": "int", "outliers": -0.01}, "outlier fraction"),
        ({"bits": 3, "datatype": "int", "outliers": 0.03}, "outlier fraction"),
        ({"bits": 3, "datatype": "int", "outliers": float("nan")}, "outlier fraction"),
        ({"bits": 3, "datatype": "float"}, "datatype"),
        ({"bits": 3, "datatype": "int", "strategy": "head"}, "strategy"),
        ({"bits": 16, "datatype": "exact", "outliers": 0.01}, "Exact schemes"),
        ({"bits": 8, "datatype": "nuq"}, "8 bits"),
        ({"bits": 2, "datatype": "int", "qnorm": True}, "Q-Norm"),
        ({"bits": 2, "datatype": "int", "outlier_cap": 4}, "cap"),
        ({"bits": 4, "datatype": "int", "scale_dtype": "float8"}, "8 bits"),
        ({"bits": 2, "datatype": "iv"}, "strategy block"),
        ({"bits": 2, "datatype": "int", "strategy": "block", "group_size": 64}, "strategy block"),
        ({"bits": 2, "datatype": "int", "round_down": True}, "strategy block"),
        ({"bits": 2, "datatype": "iv", "strategy": "block"}, "group of tokens"),
        ({"bits": 3, "datatype": "iv", "strategy": "block", "group_size": 64}, "2 bits"),
        ({"bits": 2, "datatype": "iv", "strategy": "block", "group_size": 64, "lookahead_blocks": 0}, "lookahead_blocks"),
        ({"bits": 2, "datatype": "int", "lookahead_blocks": 2}, "lookahead_blocks"),
        ({"bits": 8, "datatype": "int", "smooth_alpha": 2}, "power from 0 to 1"),
        ({"bits": 8, "datatype": "int", "smooth_alpha": True}, "power from 0 to 1"),
        ({"bits": 3, "datatype": "nuq", "smooth_alpha": 0.5}, "Smoothing"),
        ({"bits": 8, "datatype": "int", "smooth_alpha": 0.5, "outliers": 0.01}, "Smoothing"),
        ({"bits": 4, "datatype": "fp", "scale_dtype": "float32"}, "scale_dtype"),
        ({"bits": 4, "datatype": "fp", "scale_dtype": "float8", "outliers": 0.01}, "8 bits"),
    ],
)
def test_contradictory_options_are_refused(settings, cause):
    with pytest.raises(RecipeError, match=cause):
        Scheme.from_dict(settings)


@pytest.mark.parametrize(
    ("part", "settings", "cause"),
    [
        (Quantization, {"bits": 3, "datatype": "int", "group_size": 8}, "group"),
        (Transform, {"pre_rope": True, "learned_rotation": True}, "cannot be rotated"),
        (Transform, {"fold_gain": 1}, "fold_gain is true or false"),
        (Outliers, {"cap": 4}, "outlier cap"),
        (Outliers, {"scope": "head"}, "outlier_scope 'head' does not exist"),
    ],
)
def test_each_part_of_a_scheme_checks_its_settings(part, settings, cause):
    with pytest.raises(RecipeError, match=cause):
        part(**settings)


def test_settings_are_flat_and_have_names_of_their_own():
    scheme = Scheme(Quantization(3, "nuq"), Transform(pre_rope=True), Outliers(0.01, cap=4))
    assert scheme.settings() == {"bits": 3, "datatype": "nuq", "pre_rope": True, "outliers": 0.01, "outlier_cap": 4}
    assert len(scheme.to_dict()) == sum(len(fields(part)) for part in (Quantization, Transform, Outliers))
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == Scheme.from_dict(scheme.settings()) == scheme
    assert scheme.with_settings(outliers=0.02, bits=2).settings() == scheme.settings() | {"outliers": 0.02, "bits": 2}
    for plain in ({"bits": 3}, {"bits": 3, "datatype": "nuq", "fraction": 0.01}):
        with pytest.raises(RecipeError, match=r"A Scheme (needs|has no field)"):
            Scheme.from_dict(plain)


def test_a_description_says_what_differs_from_the_defaults():
    assert Scheme(Quantization(16, "exact")).describe() == "exact"
    assert (
        Scheme(Quantization(4, "int", strategy="token_head", group_size=32)).describe()
        == "int4, per token and head, groups of 32"
    )
    scheme = Scheme(Quantization(3, "nuq", qnorm=True), Transform(pre_rope=True, remove_bias=False), Outliers(0.0025))
    assert scheme.describe() == "nuq3, Q-Norm, pre-RoPE, no remove bias, outliers 0.0025"
    counts = Scheme(Quantization(3, "trellis", strategy="channel", counts=(0, 1, 0, 1, 0, 0, 0)))
    assert counts.describe() == "trellis3, per channel, counts 0 1 0 1 0 0 0"


def test_what_needs_calibration():
    assert Scheme(Quantization(3, "nuq")).needs_calibration
    assert Scheme(Quantization(4, "int", strategy="channel")).needs_calibration
    assert Scheme(Quantization(4, "int"), outliers=Outliers(0.01, scope="matrix")).needs_calibration
    assert Scheme(Quantization(8, "int"), Transform(smooth_alpha=0.5)).needs_calibration
    assert not Scheme(Quantization(4, "int"), outliers=Outliers(0.01)).needs_calibration
    assert not Scheme(Quantization(16, "exact")).needs_calibration
