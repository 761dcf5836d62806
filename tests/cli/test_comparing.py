"""`compare` and `ablate` as a user meets them: files, plots, a run that goes on, one sentence on errors."""

import pytest

from narrowkv.evaluate.results import read_result


def texts(folder):
    return ("--text", folder / "text.txt", "--calibration-text", folder / "text.txt", "--window", 64, "--limit", 1)


def test_compare(narrowkv, folder, tmp_path):
    small = ("--samples", 1, "--context", 128, "--decode-steps", 1, "--recall-distance", 70, "--recall-rows", 1)
    command = ("compare", folder, "--out", tmp_path, *texts(folder), *small)
    status, _, err = narrowkv(*command, "--recipes", "int4")
    assert status == 1 and "Recall over 70 tokens cannot be tested" in err and not list(tmp_path.iterdir())
    command = [0 if part == 70 else part for part in command]
    status, out, _ = narrowkv(*command, "--recipes", "int4,nuq3")
    assert status == 0 and "Least divergence first" in out and "int4" in out and "DynamicCache" in out
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare-pareto.svg"}
    before = read_result(tmp_path / "compare.json", "compare")
    assert narrowkv(*command, "--recipes", "int4,nuq3,int3")[0] == 0  # goes on
    assert read_result(tmp_path / "compare.json")["rows"][:3] == before["rows"]
    status, _, err = narrowkv(*command, "--recipes", "int4", "--samples", 2)
    assert status == 1 and "other settings" in err


def test_ablate(narrowkv, folder, tmp_path):
    command = ("ablate", folder, "--out", tmp_path, *texts(folder), "--samples", 1, "--context", 128, "--bits", 3)
    status, out, _ = narrowkv(*command, "--ablations", "sinks,outliers")
    assert status == 0 and "Attention sinks" in out and "0.25%" in out
    assert {path.name for path in tmp_path.iterdir()} == {"ablate.json", "ablate-sinks.svg", "ablate-outliers.svg"}


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("compare", "--recipes", "nuq3,gguf"), "no recipe 'gguf'"),
        (("compare", "--recipes", "int4"), "needs a text"),
        (("ablate",), "needs a text"),
        (("ablate", "--ablations", "steps", "--bits", "four"), "widths such as 4,3,2"),
        (("ablate", "--ablations", "rope"), "no ablation 'rope'"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else "",
)
def test_bad_input_is_one_sentence(narrowkv, folder, tmp_path, arguments, cause):
    given = texts(folder) if cause != "needs a text" else ()
    status, _, err = narrowkv(arguments[0], folder, "--out", tmp_path, *given, *arguments[1:])
    assert status == 1 and err.startswith("Error:") and cause in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())
