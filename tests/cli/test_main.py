"""The door of the command line: arguments that are no text or no number, terminals and pipes of every kind."""

import io
import os
import subprocess
import sys

import pytest

from narrowkv.cli.main import run

COMMANDS = (("generate", "narrowkv://demo", "--prompt", "x"), ("compare", "narrowkv://demo", "--out", "OUT"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("option", "value"), [("--seed", "9" * 23), ("--seed", "-1"), ("--seed", "x"), ("--window", "-" + "9" * 23)]
)
def test_values_out_of_range_are_reported_with_their_option(capsys, tmp_path, command, option, value):
    with pytest.raises(SystemExit) as stop:
        run([*(str(tmp_path) if part == "OUT" else part for part in command), option, value])
    assert stop.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_temperatures_are_finite(capsys, value):
    with pytest.raises(SystemExit) as stop:
        run(["generate", "narrowkv://demo", "--prompt", "x", "--temperature", value])
    assert stop.value.code == 2 and "--temperature" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("generate", "narrowkv://demo", "--prompt", "a\udcff"), ("recipes", "show", "\udcff"), ("plan", "\ud800")]
)
def test_arguments_that_are_no_text_raise(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    printed = capsys.readouterr()
    assert (
        stop.value.code == 1
        and printed.err.startswith("Error:")
        and "not UTF-8" in printed.err
        and "Traceback" not in printed.err
    )


@pytest.mark.parametrize("device", ["meta", "cpux", ""])
def test_devices_are_checked_before_a_model_is_loaded(capsys, device):
    with pytest.raises(SystemExit) as stop:
        run(["generate", "narrowkv://demo", "--prompt", "x", "--recipe", "int4", "--device", device])
    assert stop.value.code == 1 and "choose cpu or cuda" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_terminal_can_show_it(monkeypatch, encoding):
    shown, printed = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", printed)
    with pytest.raises(SystemExit) as stop:
        run(["recipes", "list"])
    assert not stop.value.code and "narrow3" in shown.buffer.getvalue().decode(encoding)
    with pytest.raises(SystemExit) as stop:
        run(["recipes", "show", "ünknown \u2026"])
    assert stop.value.code == 1 and printed.buffer.getvalue().decode(encoding).startswith("Error: There is no recipe")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_behind_standard_output_is_reported(monkeypatch, capsys):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, "utf-8", write_through=True))
        with pytest.raises(SystemExit) as stop:
            run(["recipes", "list"])
    assert stop.value.code == 1 and capsys.readouterr().err.startswith("Error: Cannot write")


def test_a_reader_that_goes_away_ends_the_command_quietly():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "narrowkv", "recipes", "show", "int4"]
    with os.fdopen(write, "w") as pipe:
        printed = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert printed.returncode == 1 and printed.stderr == ""
