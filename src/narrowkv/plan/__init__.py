"""What a cache will take, before there is a model to fill it."""

from narrowkv.plan.models import SHAPES, ModelShape, read_shape
from narrowkv.plan.planner import Budget, plan
from narrowkv.plan.sizes import parse_bytes, parse_tokens

__all__ = ["SHAPES", "Budget", "ModelShape", "parse_bytes", "parse_tokens", "plan", "read_shape"]
