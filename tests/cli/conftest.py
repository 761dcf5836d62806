"""The command as tests of several of its parts call it."""

import pytest

from narrowkv.cli.main import run


@pytest.fixture
def narrowkv(capsys):
    """Run the command; returns (exit status, standard output, standard error)."""

    def call(*arguments):
        status = 0
        try:
            run([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, " ".join(captured.out.split()), " ".join(captured.err.split())

    return call
