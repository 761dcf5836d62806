"""Starting: what is imported when, and what runs without transformers."""

import subprocess
import sys

import torch

import narrowkv
from narrowkv import defaults
from narrowkv.evaluate.ablate import NAMES
from narrowkv.evaluate.task_rows import MAKERS
from narrowkv.exports.formats import FORMATS
from narrowkv.plan import SHAPES


def python(code):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert tuple(FORMATS) == defaults.EXPORT_FORMATS
    assert defaults.ABLATIONS == NAMES and tuple(MAKERS) == defaults.TASKS and tuple(SHAPES) == defaults.SHAPES


def test_the_core_runs_where_there_is_neither_transformers_nor_a_command_line(tiny, tmp_path):
    """Quantize, pack, append, attend, load and save tables, with torch, numpy and safetensors alone."""
    model = tiny()
    narrowkv.calibrate(model, [torch.randint(2, 97, (1, 128))], narrowkv.get_recipe("narrow3")).save_pretrained(tmp_path / "1")
    code = f"""
import sys
for name in ("transformers", "tokenizers", "huggingface_hub", "typer", "rich", "matplotlib"):
    sys.modules[name] = None
import torch
from narrowkv import Calibration, NarrowKVError, get_recipe
from narrowkv.attention import AttentionInputs, AttentionMask, BACKENDS, Rope
from narrowkv.codec import Quantization, Scheme, quantizer_for
from narrowkv.codec.packing import pack, unpack
from narrowkv.store import LayerStore

elements = torch.randn(1, 2, 64, 16)
encoded = quantizer_for(Scheme(Quantization(4, "int"))).encode(elements)
print(torch.equal(unpack(pack(encoded.codes, 4), 4), encoded.codes))

calibration = Calibration.from_pretrained({str(tmp_path / "1")!r})
calibration.save_pretrained({str(tmp_path / "2")!r})
print(Calibration.from_pretrained({str(tmp_path / "2")!r}) == calibration)
try:
    Calibration.from_pretrained("no/such")
except NarrowKVError as error:
    print("huggingface_hub" in str(error))

for recipe, quantizers in ((calibration.recipe, calibration.quantizers(0)), (get_recipe("int4"), None)):
    heads, dim = calibration.shapes[0]
    store = LayerStore(*(quantizers or recipe.quantizers(0)), sinks=recipe.sinks)
    keys, values = torch.randn(2, 1, heads, 80, dim)
    store.append(keys[:, :, :79], values[:, :, :79])
    store.append(keys[:, :, 79:], values[:, :, 79:])
    rope = Rope(1 / 10_000 ** (torch.arange(dim // 2) / (dim // 2)))
    query, positions = torch.randn(1, heads, 1, dim), torch.arange(80)[None]
    inputs = AttentionInputs(query, 80, None, rope, positions, AttentionMask(None), dim**-0.5)
    found = [BACKENDS[name](inputs, store) for name in ("cpu", "naive")]
    print(torch.allclose(*found, atol=0.02), bool(found[0].any()))
"""
    assert python(code) == "True\n" * 3 + "True True\n" * 2
