"""`narrowkv report`: metrics are measured once, and the page shows those of the files next to it."""

import pytest
from tests.cli.test_cli import narrowkv  # noqa: F401

from narrowkv.evaluate.results import read_result


def test_a_report_is_made_and_made_again(narrowkv, tmp_path):  # noqa: F811
    command = ["report", "narrowkv://demo", "--out", tmp_path, "--quick", "--window", 64, "--only", "inspect,plan"]
    status, out, err = narrowkv(*command)
    assert status == 0 and "report.html" in out and "inspect, 2 of 2" in err
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix == ".json"}
    assert set(files) == {"plan.json", "inspect.json"}
    page = (tmp_path / "report.html").read_text()
    assert page.index("What fits") < page.index("What is quantized")
    assert page.count("<svg") == len(list(tmp_path.glob("*.svg"))) > 4
    assert read_result(tmp_path / "inspect.json")["command"] in page.replace("&#39;", "'")
    assert narrowkv(*command)[0] == 0
    assert all((tmp_path / name).read_bytes() == saved for name, saved in files.items())


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("narrowkv://demo", ["--only", "plan,plots"], "'plots'; there are plan, compare"),
        ("llama-7b", [], "needs a text; give one with --text FILE"),
    ],
)
def test_unreportable_models_raise_and_write_nothing(narrowkv, tmp_path, model, options, words):  # noqa: F811
    status, _, err = narrowkv("report", model, "--out", tmp_path, *options)
    assert status == 1 and words in " ".join(err.split()) and not list(tmp_path.iterdir())
