"""The floors of the house: a module imports only from its own floor and those below."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "narrowkv"
FLOORS = ["codec", "methods", "store", "attention", "calibration", "integrations", "evaluate", "plan", "report", "cli"]
FOUNDATION = {"defaults", "errors", "files", "tensor_file", "__init__", "_kernels", "__version__"}
# `Recipe.cache` and `Calibration.cache`: sugar for users
UPWARDS = {(f"{floor}.py", "narrowkv.integrations") for floor in ("methods/recipe", "calibration/calibration")}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path, at_need=False):
    """Names imported when the module is, and at_need inside its functions too; not those for type checkers only."""
    pending = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if at_need and isinstance(node, ast.FunctionDef | ast.ClassDef | ast.With | ast.For):
            pending += node.body
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "narrowkv" else [node.module]
            )
        elif isinstance(node, ast.Try):
            pending += node.body


def floor(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__main__", "cli")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    here = floor(path)
    if here in FOUNDATION:
        return
    for name in imported(path, at_need=True):
        if name.startswith("narrowkv.") and (str(path.relative_to(PACKAGE)), name) not in UPWARDS:
            there = name.split(".")[1]
            assert there in FOUNDATION or FLOORS.index(there) <= FLOORS.index(here), f"{here} imports {name}"
        if FLOORS.index(here) < FLOORS.index("integrations"):
            assert not name.startswith("transformers"), f"{here} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_prints(path):
    if floor(path) != "cli":
        assert not {"rich", "sys"} & set(imported(path)) or path.name == "interface.py"
    calls = [
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert not {"print", "eval", "exec"} & set(calls)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pickle_no_foreign_code_and_short_files(path):
    text = path.read_text(encoding="utf-8")
    assert "import pickle" not in text and "torch.load" not in text and "trust_remote_code" not in text
    assert len(text.splitlines()) <= 320


FACTORIES = {"empty", "zeros", "ones", "full", "tensor", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_has_a_dtype_and_a_device_by_name(path):
    """Else they would be those that the program has chosen as its default."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        if name.startswith("torch.") and name.removeprefix("torch.") in FACTORIES:
            named = {keyword.arg for keyword in call.keywords}
            assert {"dtype", "device"} <= named, f"line {call.lineno}: {ast.unparse(call)}"
