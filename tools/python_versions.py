"""Build the wheel for every version of Python that is served and found here, import its kernels there, compile every file.

Versions for which there is no interpreter (on the path, or by pyenv) are named and left out. Torch need not be there.
"""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "build" / "versions"
VERSIONS = ("3.10", "3.12", "3.13")  # the suite runs on 3.11
FILES = ("src", "tests", "tools", "benchmarks", "examples")
TRIED = """
import sys
sys.path.insert(0, sys.argv[1])
import narrowkv
from narrowkv import _kernels
print(narrowkv.__version__, _kernels.instruction_sets())
"""


def main() -> None:
    for version in VERSIONS:
        python = interpreter(version)
        if python is None:
            print(f"Python {version}: no interpreter here, LEFT OUT")
        else:
            print(f"Python {version}: {check(python, BUILT / f'python-{version}')}")


def interpreter(version: str) -> str | None:
    """An interpreter of a version that starts; None where there is none."""
    known = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *(str(path) for path in known.glob(f"{version}.*/bin/python"))]
    for path in filter(None, candidates):
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return None


def check(python: str, folder: Path) -> str:
    """Build, import and compile with one interpreter; what was found. Raises CalledProcessError where it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "installed", wheel], check=True)
    options: dict = {"check": True, "cwd": folder, "stdout": subprocess.PIPE, "text": True}
    tried = subprocess.run([python, "-I", "-c", TRIED, folder / "installed"], **options).stdout.strip()
    paths = [path for part in FILES for path in (ROOT / part).rglob("*.py")]
    compiling = "import sys, pathlib; [compile(pathlib.Path(path).read_bytes(), path, 'exec') for path in sys.argv[1:]]"
    subprocess.run([python, "-I", "-W", "error", "-c", compiling, *paths], check=True)
    return f"{wheel.name}, imported ({tried}), {len(paths)} files compiled"


if __name__ == "__main__":
    main()
