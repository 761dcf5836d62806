"""Files are written whole or not at all, keep their mode and their folder, and leave nothing behind."""

import os
import signal
import stat
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load

from narrowkv import tensor_file
from narrowkv.errors import FileFormatError, OutputError
from narrowkv.files import PRIVATE, link_or_copy, read_json, require_readable, write_atomically, write_json, written_at_once


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """Sets the umask for a while."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "public", "private"), [(0o022, 0o644, 0o600), (0o077, 0o600, 0o600), (0o002, 0o664, 0o600)])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, umask, mask, public, private):
    umask(mask)
    write_json(tmp_path / "public", {})
    write_atomically(tmp_path / "private", lambda path: path.write_text("mine"), PRIVATE)
    assert (mode_of(tmp_path / "public"), mode_of(tmp_path / "private")) == (public, private)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_file_that_is_written_over_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    write_json(path, {})
    assert mode_of(path) == mode and read_json(path) == {}


def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    (tmp_path / "real" / "file").write_text("old")
    link.symlink_to(tmp_path / "real" / "file")
    dangling.symlink_to(tmp_path / "real" / "other")
    write_json(link, {"a": 1})
    write_json(dangling, {"b": 2})
    assert link.is_symlink() and dangling.is_symlink()
    assert read_json(tmp_path / "real" / "file") == {"a": 1} and read_json(tmp_path / "real" / "other") == {"b": 2}


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    tensors = {"a": torch.arange(3)}
    for write in (lambda: write_json(pipe, {}), lambda: tensor_file.write(pipe, {}, tensors, PRIVATE)):
        reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
        reader.start()
        write()
        reader.join()
        assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert found[0] == b"{}\n" and torch.equal(load(found[1])["a"], tensors["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="no mode keeps root out")
def test_a_folder_that_may_not_be_looked_into_is_written_to(tmp_path):
    (tmp_path / "mailbox").mkdir(mode=0o300)
    write_json(tmp_path / "mailbox" / "file", {})
    assert read_json(tmp_path / "mailbox" / "file") == {}


KILLED = """
import os, signal, sys
from pathlib import Path
from narrowkv.files import write_atomically

def write(path):
    path.write_text("half")
    (path.parent / "left by a library").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()

write_atomically(Path(sys.argv[1]), write)
"""


def test_stale_temporary_folders_are_removed_but_not_those_in_use(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for ends in (False, True):
        command = [sys.executable, "-c", KILLED, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b"writing\n"
            write_json(tmp_path / "another", {})
            assert len(list(tmp_path.iterdir())) == 3  # a living writer is let alone
            writer.communicate() if ends else writer.send_signal(signal.SIGKILL)
        assert path.read_text() == ("half" if ends else "old")
        write_json(tmp_path / "another", {})
        assert sorted(tmp_path.iterdir()) == [tmp_path / "another", path]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, full)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, lambda _: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [(file, file.read_text()) for file in tmp_path.iterdir()] == [(path, "old")]


@pytest.mark.parametrize(("name", "cause"), [("folder", "it is a folder"), ("a\0b", "NUL"), ("file/below", "Not a directory")])
def test_unwritable_paths_raise_with_the_cause(tmp_path, name, cause):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=cause):
        write_json(tmp_path / name, {})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "cause"),
    [("nothing", "does not exist"), ("folder", "Is a directory"), ("a\0b", "NUL"), ("closed", "Permission denied")],
)
def test_unreadable_files_raise_with_the_cause(tmp_path, monkeypatch, name, cause):
    (tmp_path / "folder").mkdir()
    (tmp_path / "closed").write_text("{}")
    (tmp_path / "closed").chmod(0)
    if name == "closed" and os.geteuid() == 0:  # whom no mode keeps out

        def closed(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.open", closed)
    for read in (require_readable, read_json):
        with pytest.raises(FileFormatError, match=cause):
            read(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"])
def test_a_damaged_json_file_raises_an_error(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FileFormatError, match="damaged"):
        read_json(tmp_path / "file")


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_at_once(tmp_path, umask, there):
    target = tmp_path / "new" / "folder"
    if there:
        target.mkdir(parents=True)
    with written_at_once(target) as folder:
        (folder / "file").write_text("mine")
        write_json(folder / "other", {})
        assert not target.exists() or not any(target.iterdir())
    assert sorted(path.name for path in target.iterdir()) == ["file", "other"] and mode_of(target) == 0o755
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_a_folder_that_cannot_be_finished_does_not_appear(tmp_path):
    def fail(error):
        with written_at_once(tmp_path / "folder") as folder:
            (folder / "file").write_text("mine")
            raise error

    for error, raised in ((OSError(28, "No space left"), OutputError), (ValueError("mine"), ValueError)):
        with pytest.raises(raised):
            fail(error)
        assert not any(tmp_path.iterdir())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    with pytest.raises(OutputError, match="has files already"), written_at_once(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder" / "file").read_text() == "old"


def test_a_file_is_copied_where_it_cannot_be_linked(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    link_or_copy(tmp_path / "link", tmp_path / "one")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "link", tmp_path / "two")
    assert os.path.samefile(tmp_path / "file", tmp_path / "one") and not (tmp_path / "one").is_symlink()
    assert (tmp_path / "two").read_text() == "mine" and not os.path.samefile(tmp_path / "file", tmp_path / "two")
