"""HumanEval (arXiv 2107.03374): functions completed from their docstrings, judged by their tests.

What the model writes is run: in a process of its own without the environment, in an empty folder, with a limit of memory and
time, but with your rights.
"""

import gzip
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.real_models import TEXTS
from benchmarks.tasks.caches import Kind
from benchmarks.tasks.generated import completions

NAME = "HumanEval"
PROBLEMS = TEXTS.parent / "tasks" / "HumanEval.jsonl.gz"
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
COUNT, NEW_TOKENS = 60, 256
SECONDS, MEMORY = 10, 2**31


def limited() -> None:
    """Limit memory and processor time of the process that is about to start."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def passes(problem: dict[str, str], completion: str) -> bool:
    """Whether a completion passes the problem's tests, run in a process of its own."""
    program = f"{problem['prompt'].strip()}{completion}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            ran = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={},
                timeout=2 * SECONDS,
                preexec_fn=limited,
                capture_output=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return ran.returncode == 0


def problems(path: Path, count: int) -> list[dict[str, str]]:
    """The first problems of the file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:count]


def passed(model: Any, tokenizer: Any, kind: Kind, count: int = COUNT) -> list[bool]:
    """Whether each problem's tests pass."""
    asked = problems(PROBLEMS, count)
    texts = completions(model, tokenizer, [problem["prompt"].strip() for problem in asked], kind, NEW_TOKENS, STOPS)
    return [passes(problem, text) for problem, text in zip(asked, texts, strict=True)]
