"""`narrowkv calibrate` under budgets that options name."""

import pytest

from narrowkv import Calibration


@pytest.fixture
def calibrating(narrowkv, folder, tmp_path):
    """Runs the command with options; returns its status and what it said, as one line each."""
    common = ("--text", folder / "text.txt", "--window", 64, "--samples", 3, "--out", tmp_path)

    def run(*options):
        status, *said = narrowkv("calibrate", folder, *common, *options)
        return status, *(" ".join(text.split()) for text in said)

    return run


def test_each_side_has_a_budget_of_its_own(calibrating, tmp_path):
    status, out, _ = calibrating("--key-bits", 4, "--value-bits", 3)
    assert status == 0 and "of 4 bits, values" in out and "narrow-k4.0-v3.0" in out
    learned = Calibration.from_pretrained(tmp_path)
    assert learned.recipe.name == "narrow-k4.0-v3.0"
    assert all(part["bits"] <= part["budget"] for part in learned.provenance["allocation"]["sides"].values())


def test_layers_get_equal_bytes(calibrating, tmp_path):
    status, out, _ = calibrating("--bits", 4, "--equal-layers")
    learned = Calibration.from_pretrained(tmp_path)
    (size,) = set(learned.provenance["allocation"]["stream_bytes"].values())
    assert status == 0 and f"{size} bytes of a token in every layer" in out and learned.recipe.name == "narrow4.0-equal"


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("--key-bits", 4, "--value-bits", 2, "--bits", 2.7), "either --bits or --recipe or --key-bits"),
        (("--key-bits", 4, "--value-bits", 2, "--recipe", "narrow3"), "either --bits or --recipe or --key-bits"),
        (("--bits", 2.7, "--recipe", "narrow3"), "either --bits or --recipe"),
        (("--equal-layers", "--recipe", "nuq3"), "take a narrow one"),
        (("--key-bits", 4), "give both"),
        (("--value-bits", 2, "--bits", 3), "give both"),
        (("--key-bits", 4, "--value-bits", 0.5), "a budget of 0.5 bits is too small"),
    ],
)
def test_incompatible_options_are_refused(calibrating, options, cause):
    status, _, err = calibrating(*options)
    assert status == 1 and cause in err
