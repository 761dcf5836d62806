"""Writing results so that nothing half-written stays behind, and reading them so that damage is noticed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from narrowkv.errors import FileFormatError, OutputError

TEMPORARY = re.compile(r"\.narrowkv-[0-9a-f]{16}\.tmp")  # folders in which files are written
PRIVATE, PUBLIC = 0o600, 0o666  # modes of new files; the umask takes away from them


def write_atomically(path: Path, write: Callable[[Path], object], mode: int = PUBLIC) -> None:
    """Let `write` fill a temporary file, then give it the name `path`: readers and crashes meet the old file or the new one.

    A symbolic link is written through, and a file that is there keeps its mode; a new one gets `mode` less the umask. What is
    no file (a pipe, /dev/stdout) is given the same bytes. Raises OutputError where writing fails.
    """
    try:
        if not _replaceable(path):
            _write_through(path, write)
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        with _folder_next_to(target) as folder:
            temporary = folder / target.name
            mode = _mode_for(target, temporary, mode)
            write(temporary)
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                os.chmod(temporary, mode)
            _sync(temporary)
            os.replace(temporary, target)
        with contextlib.suppress(OSError):  # some file systems cannot
            _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"Cannot write {path}: {reason(error)}; choose a folder that is writable and has space.") from error


def require_new_folder(path: Path) -> None:
    """Raise OutputError where there are files in the folder already."""
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"The folder {path} has files already; name a new one.")


@contextlib.contextmanager
def written_at_once(path: Path) -> Iterator[Path]:
    """A folder to write files into, which gets the name `path` when all are there, and is gone if that fails.

    Raises OutputError where `path` has files already, or where writing fails.
    """
    require_new_folder(path)
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        with _folder_next_to(target) as folder:
            made = folder / target.name
            made.mkdir()
            yield made
            os.replace(made, target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"Cannot write {path}: {reason(error)}; choose a folder that is writable and has space.") from error


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where file systems differ; raises OSError."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON, atomically."""
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise OutputError(f"Cannot write {path}: a figure is NaN or infinite, which JSON cannot store.") from error
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def require_readable(path: Path) -> None:
    """Raise FileFormatError, with the cause, where `path` is no file that can be read."""
    try:
        _require_name(path)
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} does not exist; check the name.") from error
    except OSError as error:
        raise FileFormatError(f"Cannot read {path}: {reason(error)}; name a file that you may read.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises FileFormatError where there is none."""
    require_readable(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged ({reason(error)}); write it anew or copy it again.") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} is damaged (a JSON object is expected); write it anew or copy it again.")
    return content


def reason(error: BaseException) -> str:
    """What went wrong, in the first line of a message."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def checksum(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _require_name(path: Path) -> None:
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a file's name cannot have a NUL character")


def _replaceable(path: Path) -> bool:
    """Whether `path` is a file, or nothing yet, and not a device or a pipe. Raises OSError for a folder."""
    _require_name(path)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        return True
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    return stat.S_ISREG(kind)


def _write_through(path: Path, write: Callable[[Path], object]) -> None:
    """Give what `write` makes to a device or a pipe, of which libraries that rename what they write would make a file."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        write(made)
        with made.open("rb") as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)


@contextlib.contextmanager
def _folder_next_to(target: Path) -> Iterator[Path]:
    """A folder of our own to write in, locked while its writer lives: libraries too leave files of theirs where they write."""
    while True:
        folder = target.with_name(f".narrowkv-{secrets.token_hex(8)}.tmp")
        folder.mkdir(0o700)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # somebody took it for stale before it was locked
            continue
        with contextlib.suppress(OSError):  # not all file systems have locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.exists():
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove_stale(folder: Path) -> None:
    """Remove folders of writers that were killed, whose locks are free."""
    names: list[str] = []
    with contextlib.suppress(OSError):  # who may write here need not be allowed to look
        names = os.listdir(folder)
    for name in filter(TEMPORARY.fullmatch, names):
        with contextlib.suppress(OSError):
            handle = os.open(folder / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder / name)
            finally:
                os.close(handle)


def _mode_for(target: Path, temporary: Path, mode: int) -> int:
    """The mode of the file that is there, or what the umask leaves of `mode`."""
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(target.stat().st_mode)
    os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, mode))
    return stat.S_IMODE(temporary.stat().st_mode)


def _sync(path: Path) -> None:
    """Let a file, or the names in a folder, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
