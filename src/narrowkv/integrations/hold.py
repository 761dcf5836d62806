"""`Hold`: all that is stored with a model that knows our caches, under one lock: what the probe found, our hooks, its
attention.

It lies on the language model, so that whatever contains that model finds the same one; copies of the model, and models sent to
another process, take it along. The model's configurations name our attention only while one of our caches is in use: whoever
reads them at any other time finds what the user has chosen.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from narrowkv.calibration.wrappers import decoder_of
from narrowkv.errors import CacheUseError

PREFIX = "narrowkv-"  # of the names under which our attention is registered; the attention that it goes back to follows
SERVED = ("eager", "sdpa")


# the rest of the model compiles; what follows chooses tensors by lengths and by their elements
not_traced: Any = functools.partial(
    torch.compiler.disable,
    reason="a packed cache grows page by page and keeps outliers sparse, so its shapes depend on data: it runs uncompiled",
)


class Hold:
    """What is stored with one model.

    info, dense: what the probe found, for packed layers and for the dense path. configs: those that name the attention of the
    language model or of what contains it, each with the name that the user has chosen. modules: those that know this hold.
    hooks: what is removed when it ends. warned_of_length: whether a warning was given.
    """

    def __init__(self) -> None:
        self.info: Any = None
        self.dense: Any = None
        self.configs: list[tuple[Any, str]] = []
        self.modules: list[nn.Module] = []
        self.hooks: list[Any] = []
        self.warned_of_length = False
        self._unshare()

    def _unshare(self) -> None:
        self.lock = threading.RLock()
        self.runs: set[tuple[int, int]] = set()  # thread and module of each run under way
        self.changes: dict[str, tuple[int, Callable[[], None]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the same facts and hooks, and a lock and runs of its own."""
        return {name: part for name, part in vars(self).items() if name not in ("lock", "runs", "changes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._unshare()

    @property
    def is_empty(self) -> bool:
        """Whether nobody would miss it."""
        return not (self.info or self.dense or self.modules or self.runs or self.changes)

    @not_traced
    def begin(self, module: object, packed: bool) -> None:
        """A module, or the probe, begins to run. packed: with one of our caches, for which configurations name our attention
        until nothing of the model runs any more; so no run in another thread finds, half-way, an attention that knows no
        masks of ours.

        Raises CacheUseError where the user has chosen another attention since the model was prepared.
        """
        with self.lock:
            self.runs.add((threading.get_ident(), id(module)))
            for config, chosen in self.configs if packed else ():
                if (found := plain_name(config)) != chosen:
                    raise CacheUseError(f"The model's attention was set to {found!r} after the cache was made; make another.")
                if found in SERVED:
                    config._attn_implementation_internal = PREFIX + found  # the setter would change what is nested too

    @not_traced
    def end(self, module: object) -> None:
        """It has run to its end, or failed."""
        with self.lock:
            self.runs.discard((threading.get_ident(), id(module)))
            for config, _ in () if self.runs else self.configs:
                if config._attn_implementation != plain_name(config):
                    config._attn_implementation_internal = plain_name(config)

    def name(self, configs: list[Any]) -> None:
        """Take note of what configurations name now, of these and of those noted before."""
        every = {id(config): config for config in (*(config for config, _ in self.configs), *configs)}
        self.configs = [(config, plain_name(config)) for config in every.values()]

    @property
    def is_in_use(self) -> bool:
        """Whether `in_use` lasts, in any thread."""
        return any(module == id(self) for _, module in self.runs)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, configurations name our attention, as while one of our caches is in use."""
        try:
            self.begin(self, packed=True)
            yield
        finally:
            self.end(self)


def plain_name(config: Any) -> str:
    """The attention that a configuration names when none of our caches is in use."""
    return str(config._attn_implementation).removeprefix(PREFIX)


def hold_of(module: nn.Module) -> Hold | None:
    """The hold that a module knows."""
    hold: Hold | None = vars(module).get("narrowkv_hold")
    return hold


@contextlib.contextmanager
def locked(model: Any) -> Iterator[Hold]:
    """The hold of a model, for one thread at a time."""
    decoder = decoder_of(model)
    while True:
        hold: Hold = vars(decoder).setdefault("narrowkv_hold", Hold())
        with hold.lock:
            if vars(decoder).get("narrowkv_hold") is not hold:  # given up while this thread waited
                continue
            try:
                yield hold
            finally:
                if hold.is_empty:
                    vars(decoder).pop("narrowkv_hold", None)
            return


@contextlib.contextmanager
def changed(model: Any, name: str, change: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """A change of a model that several threads may want at a time: the first makes it, the last undoes it."""
    with locked(model) as hold:
        count, undo = hold.changes[name] if name in hold.changes else (0, change())
        hold.changes[name] = count + 1, undo
    try:
        yield
    finally:
        with locked(model) as hold:
            count, undo = hold.changes.pop(name)
            if count > 1:
                hold.changes[name] = count - 1, undo
            else:
                undo()


def evaluating(model: Any) -> contextlib.AbstractContextManager[None]:
    """Every module in evaluation mode for a while, and then as it was."""

    def evaluate() -> Callable[[], None]:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        return lambda: restore(modes)

    def restore(modes: list[tuple[nn.Module, bool]]) -> None:
        for module, training in modes:
            module.training = training

    return changed(model, "evaluating", evaluate)
