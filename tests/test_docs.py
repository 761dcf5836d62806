"""Every command and every line of Python on a page runs, or a mark before its block says why it does not.

The mark is a comment, `<!-- not run: the reason -->`, on the line before a block. Blocks of a page run one after the other, in
one folder and with the same names, on the built-in model. `MODEL` stands for it, `TEXT` for a file, `tables` for tables of it.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import narrowkv
from narrowkv.cli.main import app, run
from narrowkv.integrations.models import model_folder
from tests.conftest import make_tiny
from tests.gguf_files import write_gguf

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
}
BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- not run: (?P<reason>[^\n]+) -->\n+ *)?```(?P<language>\w*)\n(?P<code>.*?)^ *```$",
    flags=re.M | re.S,
)
NOT_RUN = {  # whole pages, and why; the marks of blocks are for the others
    "docs/engines.md": "needs the engines; tests/exports does what these commands do",
    "docs/serve.md": "serves until it is stopped; tests/serve starts servers and has such a client",
    "docs/training.md": "needs a trainer of yours; tests/training trains small models",
    "docs/vllm.md": "needs vLLM; `make test-vllm` runs it",
}
RUN_ELSEWHERE = {"narrowkv demo": "tests/cli/test_demo.py"}
SHORT = {  # appended, so that a command measures and learns little; of an option given twice the last one holds
    "ablate": "--window 256 --limit 1 --samples 1",
    "calibrate": "--window 256 --samples 3",
    "compare": "--window 256 --limit 1 --samples 1 --context 512 --decode-steps 2 --recall-distance 0",
    "eval": "--window 256 --limit 1 --recall-distance 0",
    "generate": "--max-new-tokens 3",
    "inspect": "--window 256 --samples 1",
    "tasks": "--lengths 512 --depths 0.5 --rows 1 --window 256 --samples 1",
}
TEXTS = ("TEXT", "wiki.txt", "code.py", "chat.txt", "tickets.txt")
RULER = '{"input": "The password is red. The password is", "outputs": [" red"]}\n'


def blocks(page):
    """Blocks of a page: language, lines without their indent, and the reason for which they do not run."""
    for found in BLOCK.finditer(PAGES[page]):
        lines = found["code"].splitlines()
        code = "\n".join(line.removeprefix(found["indent"]) for line in lines)
        yield found["language"], code, found["reason"] or NOT_RUN.get(page)


def commands(code):
    """The commands of a block of bash, without comments; a backslash joins lines."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What commands of pages read: texts, the calibration of the built-in model, a GGUF file."""
    path = tmp_path_factory.mktemp("pages")
    for name in TEXTS:
        (path / name).write_text("The password of Matilda is silent harbour. An assignment statement binds names.\n" * 400)
    (path / "niah_single_1").mkdir()
    (path / "niah_single_1" / "validation.jsonl").write_text(RULER)
    write_gguf(make_tiny("qwen2"), path / "model.gguf")
    model, tokenizer = narrowkv.load_model("narrowkv://demo")
    ids = tokenizer((path / "TEXT").read_text(), return_tensors="pt").input_ids[:, :256]
    narrowkv.calibrate(model, [ids], "narrow3").save_pretrained(path / "tables")
    return path


@pytest.fixture
def names():
    """What Python of pages takes for granted, besides what earlier blocks of the page define."""
    model, tokenizer = narrowkv.load_model("narrowkv://demo")
    inputs = tokenizer("The password of Matilda is", return_tensors="pt")
    return {
        "narrowkv": narrowkv,
        "torch": torch,
        "model": model,
        "tokenizer": tokenizer,
        "inputs": inputs,
        "name": model_folder("narrowkv://demo"),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if any(reason is None for *_, reason in blocks(page))])
def test_blocks_run(page, folder, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "pages"))
    for language, code, reason in blocks(page):
        if reason is None and language == "python":
            exec(compile(code, page, "exec"), names)
        elif reason is None and language == "bash":
            for words in commands(code):
                run_command(words)


def run_command(words):
    """Run a command of ours shortly; look up what installs or makes something."""
    if shlex.join(words) in RUN_ELSEWHERE:
        assert (ROOT / RUN_ELSEWHERE[shlex.join(words)]).exists()
    elif words[0] == "narrowkv":
        with pytest.raises(SystemExit) as stop:
            run([*map(filled, words[1:]), *shlex.split(SHORT.get(words[1], ""))])
        assert not stop.value.code, words
    else:
        assert check_command(words), f"no test knows how to run {shlex.join(words)}; mark the block, or teach this test"


def filled(word):
    return "narrowkv://demo" if word == "MODEL" else word


def check_command(words):
    """Raise if an option, an extra, a target or a module does not exist; False if the command is not known here at all."""
    if words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        package, _, extra = words[2].rstrip("]").partition("[")
        assert package in (".", "narrowkv") and extra in ("", *project["optional-dependencies"])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M), words
    elif words[0] == "narrowkv":
        command = get_command(app).commands[words[1]]
        command.make_context(words[1], list(map(filled, words[2:])))
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        assert (ROOT / (words[2].replace(".", "/") + ".py")).exists(), words
    elif words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).exists(), words
    elif words[0] == "torchrun":
        assert words[3:5] == ["-m", "narrowkv"]
        check_command(words[4:])
    else:
        return False
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_block_names_its_language_and_marked_commands_exist(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = list(blocks(page))
    assert len(found) * 2 == len(re.findall(r"^ *```", PAGES[page], flags=re.M)), "a block that this test does not see"
    for language, code, reason in found:
        assert language in ("bash", "python") or (language in ("json", "text", "yaml") and reason is None), code
        if language == "bash" and reason is not None:
            for words in commands(code):
                check_command(words)
        elif language == "python":
            compile(code, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


def test_a_block_in_a_list_and_a_mark_are_seen(monkeypatch):
    text = "1. Do\n\n    ```bash\n    narrowkv env\n    ```\n\n<!-- not run: no GPU -->\n```python\nx = 1\n```\n"
    monkeypatch.setitem(PAGES, "page.md", text)
    assert list(blocks("page.md")) == [("bash", "narrowkv env", None), ("python", "x = 1", "no GPU")]
