"""Latent attention (MLA), which is refused: else its models would run in 16 bits without a word."""

from typing import Any, NoReturn

from vllm.v1.attention.backend import AttentionBackend

from narrowkv.errors import UnsupportedModelError
from narrowkv.vllm import VARIABLE


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedModelError(
        f"NarrowKV does not pack latent attention (MLA); unset {VARIABLE} to serve this model in 16 bits."
    )


class RefusedLatentAttention(AttentionBackend):
    """Raises UnsupportedModelError always."""

    get_name = staticmethod(_refuse)
    get_impl_cls = staticmethod(_refuse)
    get_builder_cls = staticmethod(_refuse)
    is_mla = classmethod(_refuse)
