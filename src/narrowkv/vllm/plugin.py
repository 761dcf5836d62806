"""The entry point `vllm.general_plugins`, which vLLM calls in each of its processes."""

import os

from narrowkv.vllm import VARIABLE


def register() -> None:
    """Put NarrowKV's attention behind vLLM's CPU_ATTN, if a calibration is named.

    Modules that could be missing are imported here only: vLLM logs what fails when an entry point is loaded, and goes on in 16
    bits. What this function raises ends it.
    """
    if os.environ.get(VARIABLE):
        from narrowkv.vllm.registration import register_backends

        register_backends()
