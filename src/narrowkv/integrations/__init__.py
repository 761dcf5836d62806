"""Transformers: the cache class, the hold on a model, calibration."""

from narrowkv.integrations.cache import PackedCache
from narrowkv.integrations.capture import calibrate, calibrate_many
from narrowkv.integrations.interface import prepare
from narrowkv.integrations.models import load_model

__all__ = ["PackedCache", "calibrate", "calibrate_many", "load_model", "prepare"]
