"""The command as tests of several of its parts call it."""

import pytest
from tests.conftest import make_tiny
from tests.letters import TEXT, make_letters

from narrowkv.cli.main import run


@pytest.fixture
def run_command(capsys):
    """Run the command; returns (exit status, standard output, standard error) as they are."""

    def call(*arguments):
        status = 0
        try:
            run([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def narrowkv(run_command):
    """The same, with what is printed in one line."""

    def call(*arguments):
        status, out, err = run_command(*arguments)
        return status, " ".join(out.split()), " ".join(err.split())

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, its tokenizer and a text."""
    path = tmp_path_factory.mktemp("tiny")
    make_tiny().save_pretrained(path)
    make_letters().save_pretrained(path)
    (path / "text.txt").write_text(TEXT)
    return path
