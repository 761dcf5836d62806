"""The command line as a user meets it: exit status, one sentence on errors, files written."""

import json
import shutil

import pytest
import torch
from tests.conftest import asset
from tests.families import make
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from narrowkv import Calibration
from narrowkv import __version__ as VERSION


@pytest.fixture
def narrowkv(run_command):
    """What is printed here has lines."""
    return run_command


@pytest.fixture
def stories():
    return asset("models", "stories260K")


@pytest.fixture(scope="session")
def stories_file(stories_text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(stories_text)
    return path


def test_recipes(narrowkv, tmp_path):
    status, out, _ = narrowkv("recipes", "list")
    assert status == 0 and "nuq3-1%" in out and "int4" in out
    status, out, _ = narrowkv("recipes", "show", "nuq2-1%", "--json", tmp_path / "mine.json")
    assert status == 0 and json.loads(out)["keys"]["outliers"] == 0.01
    status, again, _ = narrowkv("recipes", "show", tmp_path / "mine.json")
    assert status == 0 and json.loads(again) == json.loads(out)


def test_env(narrowkv, tmp_path):
    status, out, _ = narrowkv("env", "--json", tmp_path / "env.json")
    assert status == 0 and "transformers" in out
    assert json.loads((tmp_path / "env.json").read_text())["narrowkv"] == VERSION
    assert narrowkv("--version")[1].strip() == VERSION


@pytest.mark.parametrize("model", ["stories260K", "babyllama-tok105"])
def test_calibrate_then_generate_and_evaluate(narrowkv, tmp_path, stories_file, model):
    folder, target = asset("models", model), tmp_path / "calibration"
    status, out, _ = narrowkv(
        "calibrate", folder, "--recipe", "nuq3-1%", "--text", stories_file, "--window", 256, "--samples", 4, "--out", target
    )
    assert status == 0 and "1,024 tokens in 4 sequences" in " ".join(out.split())
    status, out, err = narrowkv(
        "generate", folder, "--prompt", "Once upon a time", "--calibration", target, "--max-new-tokens", 30
    )
    assert status == 0 and len(out.strip()) > 10
    assert "nuq3-1%" in err and "bits per element" in err and "attention: cpu (" in " ".join(err.split())
    report = tmp_path / "report.json"
    options = ("--text", stories_file, "--window", 256, "--limit", 2, "--json", report)
    status, out, _ = narrowkv("eval", folder, "--calibration", target, *options)
    assert status == 0 and "strict" in out and "stream" in out
    (row,) = json.loads(report.read_text())
    assert row["recipe"] == "nuq3-1%"
    assert row["perplexity_fp"] < row["perplexity_strict"] < 1.5 * row["perplexity_fp"]
    assert 0 < row["kld_strict"] < 0.5
    assert row["recall"] is None
    status, _, _ = narrowkv("eval", folder, "--recipe", "int4", *options)
    assert status == 0 and json.loads(report.read_text())[0]["recipe"] == "int4"


def test_calibrate_under_a_budget_says_what_each_choice_costs(narrowkv, tmp_path, stories_file):
    folder, target = asset("models", "stories260K"), tmp_path / "calibration"
    common = ("--text", stories_file, "--window", 256, "--samples", 4, "--out", target)
    status, out, _ = narrowkv("calibrate", folder, "--bits", 2.7, "--check", 1, *common)
    assert status == 0 and "of 2.7 bits" in out and "predicted" in out and "found" in out and "narrow2.7" in out
    allocation = Calibration.from_pretrained(target).provenance["allocation"]
    assert allocation["bits"] <= 2.7
    assert all(side["found_loss"] > 0 for sides in allocation["layers"].values() for side in sides.values())
    for options, cause in (
        (("--bits", 0.5), "too small for this model"),
        (("--bits", 2.7, "--recipe", "nuq3"), "either --bits or --recipe"),
        (("--bits", 2.7, "--check", 1, "--samples", 100000), "more text"),
    ):
        status, _, err = narrowkv("calibrate", folder, *common, *options)
        assert status == 1 and cause in " ".join(err.split())


def test_generate_calibrates_first_if_given_a_text(narrowkv, stories, stories_file):
    common = ("--recipe", "nuq2", "--calibration-text", stories_file, "--window", 128, "--samples", 2, "--max-new-tokens", 5)
    status, _, err = narrowkv("generate", stories, "--prompt", "Tom", "--temperature", "0.8", *common)
    assert status == 0 and "nuq2" in err


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("recipes", "show", "nuq7"), "7 bits"),
        (("recipes", "show", "gguf"), "nuq3-1%"),
        (("recipes", "show", "x[/bold]"), "x[/bold]"),
        (("generate", "BROKEN", "--prompt", "x", "--recipe", "int4"), "Cannot load the model"),
        (("generate", "MODEL", "--prompt", "x", "--recipe", "int4", "--device", "cpux"), "no device 'cpux'"),
        (("generate", "MODEL", "--prompt", "x", "--recipe", "int4", "--dtype", "Tensor"), "no dtype 'Tensor'"),
        (("generate", "no/such/model", "--prompt", "x"), "Cannot load the model"),
        (("generate", "narrowkv://other", "--prompt", "x"), "no built-in model"),
        (("generate", "MODEL", "--prompt", ""), "prompt is empty"),
        (("generate", "MODEL"), "either --prompt"),
        (("generate", "MODEL", "--prompt", "x", "--calibration", "no/such/folder"), "no folder"),
        (
            ("generate", "MODEL", "--prompt", "x", "--calibration", "OUT", "--recipe", "int4"),
            "either --calibration or --recipe",
        ),
        (("generate", "MODEL", "--prompt", "x", "--recipe", "int4", "--device", "cuda"), "no CUDA device"),
        (("calibrate", "MODEL", "--out", "OUT", "--text", "no/such/text.txt"), "check the path"),
        (("calibrate", "MODEL", "--out", "OUT", "--text", "SHORT"), "one window needs"),
        (("calibrate", "MODEL", "--out", "/proc/x", "--text", "LONG", "--window", "64", "--samples", "1"), "Cannot write"),
        (("eval", "MODEL", "--recipe", "int4"), "needs a text"),
        (("eval", "MODEL", "--recipe", "int4", "--text", "SHORT"), "one window needs"),
        (
            ("eval", "MODEL", "--recipe", "int4", "--text", "LONG", "--window", "64", "--limit", "1", "--json", "/proc/x/y"),
            "Cannot write",
        ),
        (("eval", "MODEL", "--recipe", "int4", "--text", "LONG", "--window", "64", "--recall-distance", "9"), "Recall over 9"),
        (("eval", "MODEL", "--recipe", "int4", "--text", "LONG", "--dtype", "float3"), "dtype"),
        (("recipes", "show", "int4", "--json", "/proc/x/y"), "Cannot write"),
    ],
    ids=lambda part: " ".join(part)[:60] if isinstance(part, tuple) else "",
)
def test_bad_input_is_one_sentence_and_a_status(narrowkv, stories, stories_file, tmp_path, arguments, cause):
    if cause == "no CUDA device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time")
    broken = tmp_path / "broken"
    shutil.copytree(stories, broken)
    (broken / "model.safetensors").write_bytes((stories / "model.safetensors").read_bytes()[:5000])
    names = {"BROKEN": broken, "MODEL": stories, "OUT": tmp_path / "out", "SHORT": short, "LONG": stories_file}
    status, _, err = narrowkv(*(names.get(argument, argument) for argument in arguments))
    assert status == 1
    assert err.strip().startswith("Error:") and cause in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_calibration_of_another_model_is_refused(narrowkv, stories, stories_file, tmp_path):
    options = ("--text", stories_file, "--window", 64, "--samples", 1, "--out", tmp_path / "c")
    assert narrowkv("calibrate", stories, *options)[0] == 0
    status, _, err = narrowkv(
        "generate", asset("models", "babyllama-tok105"), "--prompt", "x", "--calibration", tmp_path / "c"
    )
    assert status == 1 and "another model" in err


def test_usage_errors_are_typers(narrowkv):
    assert narrowkv("calibrate")[0] == 2
    assert narrowkv("no-such-command")[0] == 2


def test_a_model_that_computes_attention_by_itself_is_served_by_the_dense_path_alone(narrowkv, tmp_path, stories_file):
    model, folder = make("gptj"), tmp_path / "gptj"
    model.save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate("<s> abcdefghijklmnopqrstuvwxyz.,!?")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<")), pad_token="<")
    tokenizer.backend_tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.save_pretrained(folder)
    options = ("--window", 64, "--samples", 2, "--text", stories_file, "--out", tmp_path / "tables")
    status, _, err = narrowkv("calibrate", folder, "--recipe", "nuq3", *options)
    assert status and "choose backend 'dense'" in " ".join(err.split())
    status, _, err = narrowkv("calibrate", folder, "--recipe", "nuq3", "--backend", "dense", *options)
    assert status and "nuq3-postrope" in " ".join(err.split())
    assert narrowkv("calibrate", folder, "--recipe", "nuq3-postrope", "--backend", "dense", *options)[0] == 0
    dense = ("--calibration", tmp_path / "tables", "--backend", "dense")
    assert narrowkv("generate", folder, "--prompt", "once upon", "--max-new-tokens", 5, *dense)[0] == 0
    status, out, _ = narrowkv("eval", folder, "--text", stories_file, "--window", 64, "--limit", 1, *dense)
    assert status == 0 and "attended to is quantized" in " ".join(out.split())
