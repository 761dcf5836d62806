"""Starting: what is imported when, and what runs without transformers."""

import subprocess
import sys

import torch

import narrowkv
from narrowkv import defaults
from narrowkv.evaluate.ablate import NAMES
from narrowkv.evaluate.task_rows import MAKERS
from narrowkv.plan import SHAPES


def python(code):
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_the_package_imports_nothing_heavy_by_itself():
    heavy = "[name for name in ('torch', 'transformers', 'numpy', 'typer', 'triton', 'matplotlib') if name in sys.modules]"
    assert python(f"import sys, narrowkv; dir(narrowkv); narrowkv.NarrowKVError; print({heavy})") == "[]\n"


def test_help_of_every_command_imports_nothing_heavy():
    code = """
import contextlib, io, sys
from narrowkv.cli.main import app, run
from typer.main import get_command
names = [[], *([name] for name in get_command(app).commands), ["recipes", "list"], ["recipes", "show"]]
for name in names:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        run([*name, "--help"])
with contextlib.suppress(SystemExit):
    run(["--version"])
print(len(names) > 12, [name for name in ("torch", "transformers", "numpy", "matplotlib") if name in sys.modules])
"""
    assert python(code).split("\n")[:2] == [narrowkv.__version__, "True []"]


def test_every_public_name_is_found_and_listed():
    for name in narrowkv.__all__:
        assert getattr(narrowkv, name) is not None and name in dir(narrowkv)
    assert narrowkv.PackedCache is narrowkv.integrations.PackedCache
    assert not hasattr(narrowkv, "no_such_name")


def test_names_that_help_shows_are_those_there_are():
    assert defaults.LADDERS == NAMES and tuple(MAKERS) == defaults.TASKS and tuple(SHAPES) == defaults.SHAPES


def test_tables_are_loaded_and_attended_with_without_transformers(tiny, tmp_path):
    model = tiny()
    narrowkv.calibrate(model, [torch.randint(2, 97, (1, 128))], narrowkv.get_recipe("narrow3")).save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["transformers"] = None
import torch
from narrowkv import Calibration
from narrowkv.attention import BACKENDS, Rope, Visible
from narrowkv.store import LayerStore

calibration = Calibration.from_pretrained({str(tmp_path)!r})
heads, dim = calibration.shapes[0]
store = LayerStore(*calibration.quantizers(0), sinks=calibration.recipe.sinks)
keys, values = torch.randn(2, 1, heads, 80, dim)
store.append(keys, values)
asked = {{"past": 80, "new": None, "kept": torch.arange(80)[None], "visible": Visible(None), "scaling": dim**-0.5}}
asked["rope"] = Rope(1 / 10_000 ** (torch.arange(dim // 2) / (dim // 2)))
query = torch.randn(1, heads, 1, dim)
found = [BACKENDS[name](query, store, **asked) for name in ("cpu", "naive")]
print(torch.allclose(*found, atol=0.02), bool(found[0].any()))
"""
    assert python(code) == "True True\n"
