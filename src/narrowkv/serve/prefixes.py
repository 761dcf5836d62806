"""Beginnings of prompts that were read: stored packed, found again by their tokens, shared between requests and restarts.

A prompt is read in chunks that end at fixed multiples of tokens, and taken up again only there. So a reused prefix is what
reading it again would store, and what follows attends to the same elements.
"""

import copy
import hashlib
import logging
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from narrowkv import tensor_file
from narrowkv.errors import CacheUseError, FileFormatError, NarrowKVError, OutputError
from narrowkv.files import PRIVATE
from narrowkv.integrations import PackedCache
from narrowkv.integrations.serialization import CacheState
from narrowkv.integrations.versions import keeps_nothing

FORMAT, FORMAT_VERSION = "narrowkv-prefix", 1
LOG = logging.getLogger("narrowkv.serve")
Ids = NDArray[np.int64]


@dataclass
class Prefix:
    """Tokens that were read, and their cache, which nothing changes any more.

    scope: who may use it. used: when it was last, by count. storages: bytes of its memory, by address.
    """

    ids: Ids
    scope: str
    cache: PackedCache
    used: int = 0
    storages: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        storages = (tensor.untyped_storage() for tensor in self.cache.tensors())
        self.storages = {storage.data_ptr(): storage.nbytes() for storage in storages}

    @property
    def name(self) -> str:
        """Of its file."""
        return hashlib.sha256(self.scope.encode() + b"\0" + self.ids.tobytes()).hexdigest()[:40] + ".safetensors"


class Prefixes:
    """The prefixes of one model. budget: bytes that they may take together; the least recently used go first.

    multiple: prefixes are reused at multiples of this many tokens. All calls come from one thread.
    """

    def __init__(self, budget: int, multiple: int):
        self.budget, self.multiple = budget, multiple
        self.stored: list[Prefix] = []
        self.uses = 0
        self.nbytes = 0
        self._files: set[str] = set()  # that were loaded

    def usable(self, tokens: int) -> int:
        """Up to where a prompt of this many tokens may be taken from a prefix: one token at least is read."""
        return (tokens - 1) // self.multiple * self.multiple

    def shared(self, ids: list[int], other: list[int]) -> int:
        """How much of a prompt may be taken from another one that is read as far as `usable`."""
        common = _common(np.asarray(ids, dtype=np.int64), np.asarray(other, dtype=np.int64))
        return min(common // self.multiple * self.multiple, self.usable(len(ids)), self.usable(len(other)))

    def find(self, ids: list[int], scope: str) -> tuple[PackedCache, int] | None:
        """A cache of the longest stored beginning of a prompt, and of how many tokens; None where there is none."""
        wanted, most = np.asarray(ids, dtype=np.int64), self.usable(len(ids))
        best, length = None, 0
        for prefix in self.stored:
            common = min(_common(prefix.ids, wanted), most) // self.multiple * self.multiple
            if common > length and prefix.scope == scope and (common == len(prefix.ids) or croppable(prefix.cache)):
                best, length = prefix, common
        if best is None:
            return None
        self._touch(best)
        cache = copy.deepcopy(best.cache)
        if length < cache.length:
            cache.crop(length - cache.length)
        return cache, length

    def add(self, ids: list[int], scope: str, cache: PackedCache) -> None:
        """Store a copy of a cache that has read these tokens, a multiple of them."""
        if not self.budget or not ids:
            return
        read = np.asarray(ids, dtype=np.int64)
        known = next((one for one in self.stored if one.scope == scope and _common(one.ids, read) == len(read)), None)
        if known and (len(known.ids) == len(read) or croppable(known.cache)):
            return self._touch(known)
        self._put(Prefix(read, scope, copy.deepcopy(cache)))

    def _put(self, prefix: Prefix) -> None:
        if croppable(prefix.cache):  # it serves whatever a shorter one serves
            self.stored = [
                one for one in self.stored if one.scope != prefix.scope or _common(one.ids, prefix.ids) < len(one.ids)
            ]
        self._touch(prefix)
        self.stored.append(prefix)
        self._fit()

    def _touch(self, prefix: Prefix) -> None:
        self.uses += 1
        prefix.used = self.uses

    def _fit(self) -> None:
        """Let the least recently used go until all fit into the budget; memory that several share counts once."""
        self.stored.sort(key=lambda prefix: -prefix.used)
        storages: dict[int, int] = {}
        for i, prefix in enumerate(self.stored):
            together = storages | prefix.storages
            if sum(together.values()) > self.budget:
                self.stored = self.stored[:i]
                break
            storages = together
        self.nbytes = sum(storages.values())

    def save(self, folder: Path) -> int:
        """Write all to a folder, each to a file, without those dropped since they were loaded; returns how many."""
        require_private(folder)
        written: set[str] = set()
        for prefix in reversed(self.stored):  # the most recently used last, as `load` reads them
            try:
                _write(folder / prefix.name, prefix)
                written.add(prefix.name)
            except CacheUseError:  # it has layers that keep a state of their own
                continue
            except OutputError as error:
                LOG.warning("A prefix could not be saved: %s", error)
                break
        for name in self._files - written:
            (folder / name).unlink(missing_ok=True)
        return len(written)

    def load(self, folder: Path, model: Any, source: Any, **options: Any) -> int:
        """Read what `save` wrote, the most recently used last; what does not fit this model is left out. Returns how many."""
        require_private(folder)
        for path in sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime):
            try:
                self._put(_read(path, self.multiple, model, source, **options))
                self._files.add(path.name)
            except NarrowKVError as error:
                LOG.warning("The prefix in %s is not used: %s", path.name, error)
        return len(self.stored)


def _common(one: Ids, other: Ids) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def croppable(cache: PackedCache) -> bool:
    """Whether a cache cut at whole blocks is what reading fewer tokens would have stored."""
    others = [layer for i, layer in enumerate(cache.layers) if i not in cache.modules and not keeps_nothing(layer)]
    return not others and all(
        layer.is_croppable and layer.sliding_window is None and not max(layer.store.lookahead) for layer in cache.packed
    )


def require_private(folder: Path) -> None:
    """Make a folder for prefixes; raises OutputError where others could write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise OutputError(f"Cannot use {folder}: {error.strerror}; choose another with --prefix-dir.") from error
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise OutputError(f"Others may write to {folder}, and so change what the model has read; use a folder of your own.")


def _write(path: Path, prefix: Prefix) -> None:
    state = prefix.cache.state(torch.from_numpy(prefix.ids)[None])
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "scope": prefix.scope, "cache": state.header}
    tensor_file.write(path, header, {**state.tensors, "token_ids": torch.from_numpy(prefix.ids)}, PRIVATE)


def _read(path: Path, multiple: int, model: Any, source: Any, **options: Any) -> Prefix:
    """A prefix from a file; raises NarrowKVError where it is damaged, or of another model, calibration or chunk."""
    header, tensors = tensor_file.read(path, FORMAT, FORMAT_VERSION)
    ids, scope, state = tensors.pop("token_ids", None), header.get("scope"), header.get("cache")
    if ids is None or ids.dtype != torch.int64 or ids.dim() != 1 or not isinstance(scope, str) or not isinstance(state, dict):
        raise FileFormatError("it has contents that NarrowKV never writes")
    if not len(ids) or len(ids) % multiple:
        raise FileFormatError(f"it has {len(ids)} tokens, no multiple of {multiple}")
    cache = PackedCache.from_state(CacheState(state, tensors), model, source, token_ids=ids[None], **options)
    return Prefix(ids.numpy(), scope, cache)
