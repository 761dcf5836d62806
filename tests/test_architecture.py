"""The architecture: imports go downwards only, without cycles, and each library is imported in few places.

An import counts wherever it stands: at the top of a module, inside of a function, or for type checkers alone.
"""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "narrowkv"
FOUNDATION = {"_kernels", "_version", "defaults", "errors", "files", "hub", "tensor_file"}
CORE = ["codec", "methods", "store", "attention", "calibration"]
FLOORS = [
    "foundation",
    *CORE,
    "vllm",
    "integrations",
    "evaluate",
    "training",
    "exports",
    "plan",
    "report",
    "serve",
    "cli",
    "top",
]
MOST_LINES = 350
FACTORIES = {"empty", "zeros", "ones", "full", "tensor", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm"}

MODULES = {
    ".".join(["narrowkv", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(nodes):
    """Names of the modules that these import, in full."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their package in full"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES or name == "narrowkv._kernels" else node.module


def at_the_top(tree):
    """What runs when a module is imported, but for what stands inside of functions."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


IMPORTS = {name: set(imported(ast.walk(tree))) for name, tree in TREES.items()}
IMPORTS_AT_ONCE = {name: set(imported(at_the_top(tree))) for name, tree in TREES.items()}


def floor(name):
    package = [*name.split("."), "top"][1]
    package = {"__main__": "cli"}.get(package, package)
    return FLOORS.index("foundation" if package in FOUNDATION else package)


def is_for_triton(name):
    return ".cuda.kernels." in name or name == "narrowkv.attention.cuda.launch"


def test_imports_go_downwards():
    upwards = [(one, two) for one in IMPORTS for two in IMPORTS[one] if two.startswith("narrowkv") and floor(two) > floor(one)]
    assert not upwards


def test_imports_have_no_cycles():
    """Modules that import none of those left are taken away, again and again; a circle, and what hangs on it, would stay."""
    left = {name: {other for other in found if other in MODULES} for name, found in IMPORTS.items()}
    while free := {name for name, found in left.items() if not found & left.keys()}:
        left = {name: found for name, found in left.items() if name not in free}
    assert not left


def test_the_core_needs_torch_numpy_and_safetensors_alone():
    """And of others only what it asks for in a function: Triton on a GPU, the hub for who shares files there."""
    needed = {*sys.stdlib_module_names, "narrowkv", "torch", "numpy", "safetensors"}
    for name in (name for name in MODULES if floor(name) <= FLOORS.index(CORE[-1])):
        at_once, ever = ({other.split(".")[0] for other in found[name]} for found in (IMPORTS_AT_ONCE, IMPORTS))
        assert ever <= needed | {"triton", "huggingface_hub"}, name
        assert at_once <= needed or is_for_triton(name), name


def test_triton_is_imported_by_kernels_and_what_launches_them():
    """All else runs where it is not installed."""
    kernels = {name for name, found in IMPORTS_AT_ONCE.items() if found & {"triton", "triton.language"}}
    assert all(is_for_triton(name) for name in kernels)
    assert not [name for name, found in IMPORTS_AT_ONCE.items() if name not in kernels and found & kernels]


def test_compiled_kernels_are_imported_by_what_runs_on_a_cpu():
    users = {name.removeprefix("narrowkv.") for name, found in IMPORTS.items() if "narrowkv._kernels" in found}
    attention = {name for name in users if name.startswith("attention.cpu")}
    assert attention and users - attention == {
        "codec.cpu.encode",
        "codec.cpu.encode_streams",
        "codec.packing",
        "codec.trellis",
        "store.paged",
    }


def test_only_the_command_line_prints_and_nothing_runs_foreign_code():
    for name, tree in TREES.items():
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not {"eval", "exec", "torch.load"} & calls, name
        assert "pickle" not in IMPORTS[name] and "trust_remote_code" not in MODULES[name].read_text(encoding="utf-8"), name
        if floor(name) != FLOORS.index("cli"):
            assert "print" not in calls and "rich" not in {other.split(".")[0] for other in IMPORTS[name]}, name


def test_every_tensor_has_a_dtype_and_a_device_by_name():
    """Else they would be those that the program has chosen as its default."""
    for name, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            function = ast.unparse(call.func)
            if function.startswith("torch.") and function.removeprefix("torch.") in FACTORIES:
                named = {keyword.arg for keyword in call.keywords}
                assert {"dtype", "device"} <= named, f"{name}, line {call.lineno}: {ast.unparse(call)}"


def test_files_are_short():
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > MOST_LINES}
    assert not long
