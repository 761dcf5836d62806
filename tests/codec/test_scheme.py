import pytest

from narrowkv.codec import Scheme
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
        ({"bits": 16, "datatype": "exact", "outliers": 0.01}, "exact"),
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
def test_contradictions_are_refused(settings, cause):
    with pytest.raises(RecipeError, match=cause):
        Scheme(**settings)


def test_what_needs_calibration():
    assert Scheme(3, "nuq").needs_calibration
    assert Scheme(4, "int", strategy="channel").needs_calibration
    assert Scheme(4, "int", outliers=0.01, outlier_scope="matrix").needs_calibration
    assert Scheme(8, "int", smooth_alpha=0.5).needs_calibration
    assert not Scheme(4, "int", outliers=0.01).needs_calibration
    assert not Scheme(16, "exact").needs_calibration
