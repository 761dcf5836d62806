"""Surroundings: whatever modes of torch a caller is in, what is computed and stored here does not depend on them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

DEVICES = ("cpu", "cuda", "mps", "xpu")  # that may have an autocast of their own
NOTHING = contextlib.nullcontext()

P = ParamSpec("P")
T = TypeVar("T")


def undisturbed(gradients: bool = False) -> contextlib.AbstractContextManager[None]:
    """Within, autocast is off and new tensors are ordinary ones, also where the caller is in inference mode.

    gradients: whether those that the caller wants flow on; else there are none.
    """
    modes: list[Any] = [torch.autocast(device, enabled=False) for device in DEVICES if torch.is_autocast_enabled(device)]
    inferring = torch.is_inference_mode_enabled()
    if inferring:
        modes.append(torch.inference_mode(False))
    if inferring or (torch.is_grad_enabled() and not gradients):
        modes.append(torch.no_grad())
    return _within(modes) if modes else NOTHING


@contextlib.contextmanager
def _within(modes: list[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


def runs_undisturbed(function: Callable[P, T]) -> Callable[P, T]:
    """A function that always runs so, without gradients."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with undisturbed():
            return function(*args, **kwargs)

    return run
