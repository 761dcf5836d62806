"""Every command and every line of Python in the README runs."""

import re
import shlex
from pathlib import Path

import pytest

from narrowkv.cli.main import run

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 8
    for command in commands:
        if command in (["pip", "install", "."], ["narrowkv", "demo"]):
            continue  # what `make` did before these tests could run, and what cli/test_demo.py does
        assert command[0] == "narrowkv"
        with pytest.raises(SystemExit) as stop:
            run(command[1:])
        assert not stop.value.code, command
    assert (tmp_path / "metrics.json").exists() and (tmp_path / "my-recipe.json").exists()


def test_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert "PackedCache(narrow3" in capsys.readouterr().out


def test_links_resolve():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (Path(__file__).parents[1] / target).exists(), target
