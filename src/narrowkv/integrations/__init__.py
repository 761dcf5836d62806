"""Transformers: the cache class, hooks, calibration."""

from narrowkv.integrations.cache import PackedCache
from narrowkv.integrations.cache_group import CacheGroup
from narrowkv.integrations.calibrator import calibrate, calibrate_many
from narrowkv.integrations.decoding_graph import DecodingGraph, cuda_graph
from narrowkv.integrations.default import disable, enable, make_default
from narrowkv.integrations.explain import Explanation, explain
from narrowkv.integrations.models import load_model
from narrowkv.integrations.preparation import prepare

__all__ = [
    "CacheGroup",
    "DecodingGraph",
    "Explanation",
    "PackedCache",
    "calibrate",
    "calibrate_many",
    "cuda_graph",
    "disable",
    "enable",
    "explain",
    "load_model",
    "make_default",
    "prepare",
]
