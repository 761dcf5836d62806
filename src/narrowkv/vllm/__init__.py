"""Plug-in for vLLM on CPUs: its pages hold packed keys and values, and compiled attention reads them in place.

It does nothing unless the variable NARROWKV_VLLM_CALIBRATION names a calibration; see docs/vllm.md.
"""

VARIABLE = "NARROWKV_VLLM_CALIBRATION"
STRICT = "NARROWKV_VLLM_STRICT"  # 1: new tokens see each other in packed form too, so that answers do not depend on chunks
