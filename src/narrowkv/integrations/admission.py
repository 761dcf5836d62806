"""Checks of a call before a cache changes, so that a refused call leaves the cache as it was."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from narrowkv.codec.encode_buffer import AHEAD
from narrowkv.errors import CacheUseError

GRADIENTS = (
    "Gradients do not flow through packed keys and values, so they would be wrong; run the model under torch.no_grad() or "
    "torch.inference_mode(), or use recipe fp16."
)
IN_USE = (
    "This cache is in use by another thread; give each thread a cache of its own (copy.deepcopy(cache) shares its blocks)."
)


class ThreadHold:
    """Which thread a cache works for now, and which it worked for last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.last: threading.Thread | None = None

    def __deepcopy__(self, memo: dict) -> "ThreadHold":
        """A copy works for nobody yet."""
        return ThreadHold()

    def require(self) -> None:
        """Raise CacheUseError where the cache works for another thread that still runs."""
        if self.thread not in (None, threading.current_thread()) and self.thread.is_alive():
            raise CacheUseError(IN_USE)

    def take(self) -> None:
        """Let it work for this thread; raises as `require`."""
        with self._lock:
            self.require()
            self.thread = threading.current_thread()

    def leave(self) -> None:
        """Let it work for nobody, if it worked for this thread."""
        if self.thread is threading.current_thread():
            self.thread, self.last = None, self.thread

    @property
    def shared(self) -> bool:
        """Whether another thread that still runs used it last."""
        return self.last not in (None, threading.current_thread()) and self.last.is_alive()


def require_fit(tokens: Tensor, mask: Any, positions: Any, *, stored: int, batch_size: int, shared: bool) -> None:
    """Raise CacheUseError where new tokens, ids or embeddings [batch, new, ...], do not continue the cache's tokens.

    mask, positions: the attention mask and the positions that come with them. stored, batch_size: tokens and sequences of the
    cache; shared: whether another thread used it last.
    """
    batch, new = tokens.shape[:2]
    reached = _reached(stored + new, new, mask, positions)
    if new == 0 and stored == 0:
        raise CacheUseError("The prompt is empty; pass at least one token.")
    if new == 0 or reached < stored + new:
        raise CacheUseError(_does_not_go_on(stored, reached if reached < stored + new else None, shared))
    if stored and batch != batch_size:
        raise CacheUseError(
            f"This cache has batch {batch_size}, but got batch {batch}; call cache.reset() or make a new cache."
        )


def _reached(whole: int, new: int, mask: Any, positions: Any) -> int:
    """Up to which token what comes with new tokens goes; `whole` where it does not tell.

    `generate` leaves out a mask that hides nothing, and positions then count tokens. Few tokens on a GPU are not looked at.
    """
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.shape[1]
    counts = whole > new and mask is None and isinstance(positions, Tensor) and positions.dim() == 2 and positions.numel() > 0
    if counts and (not positions.is_cuda or new > AHEAD):
        return min(int(positions[:, -1].max()) + 1, whole)
    return whole


def _does_not_go_on(stored: int, given: int | None, shared: bool) -> str:
    if stored == 0:
        return f"The attention mask covers {given} tokens, and the prompt has more; pass one that covers them all."
    who = "This cache is in use by another thread, or was: it" if shared else "This cache"
    prompt = "none beyond them" if given is None else given
    remedy = "give each thread a cache of its own, " if shared else ""
    return (
        f"{who} has {stored} tokens and the prompt has {prompt}: {remedy}pass the whole conversation, or call cache.reset()."
    )


def wants_gradients(decoder: nn.Module, tokens: Tensor | None) -> bool:
    """Whether torch would have gradients flow through a language model that is called with such tokens."""
    if not torch.is_grad_enabled():
        return False
    return (tokens is not None and tokens.requires_grad) or any(part.requires_grad for part in decoder.parameters())
