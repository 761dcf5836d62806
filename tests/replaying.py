"""A CUDA graph in its stead, on a CPU: what torch and kernels did is written down, and done again to the same memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.equal.default}


class Recorder(TorchDispatchMode):
    """Writes down operators and interpreted kernels; nothing between runs again. Raises where the host looks at an element."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        if func in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = self.within(lambda: func(*args, **kwargs))
        known = {part.untyped_storage().data_ptr() for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)}
        made = [part for part in tree_leaves(result) if isinstance(part, Tensor)]
        fresh = [part for part in made if part.untyped_storage().data_ptr() not in known]

        def again() -> None:
            new = [part for part in tree_leaves(func(*args, **kwargs)) if isinstance(part, Tensor)]
            for old, part in zip(made, new, strict=True):
                if any(old is one for one in fresh):
                    old.copy_(part)

        self.steps.append(again)
        return result

    def within(self, run: Callable[[], Any]) -> Any:
        self.inside = True
        try:
            return run()
        finally:
            self.inside = False


def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """As `narrowkv.integrations.decoding_graph.capture`."""
    recorder, launch = Recorder(), GridExecutor.__call__

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        if recorder.inside:
            launch(executor, *args, **kwargs)
        else:  # a kernel that counts must not count while it is captured
            recorder.steps.append(lambda: launch(executor, *args, **kwargs))

    GridExecutor.__call__ = launched
    try:
        with recorder:
            result = run()
    finally:
        GridExecutor.__call__ = launch

    def replay() -> None:
        for step in recorder.steps:
            step()

    return replay, result
