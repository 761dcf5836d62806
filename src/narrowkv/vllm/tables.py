"""The calibration that the plug-in serves with, and whether it fits vLLM's model."""

import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from narrowkv.attention import Rope
from narrowkv.calibration import Calibration, Fingerprint
from narrowkv.calibration.fingerprint import sampled_positions
from narrowkv.codec import AnyQuantizer, TrellisQuantizer
from narrowkv.codec.frames import Frames
from narrowkv.errors import CalibrationError, RecipeError, UnsupportedModelError
from narrowkv.vllm import VARIABLE

Pair = tuple[TrellisQuantizer, TrellisQuantizer]
POSITIONS, FARTHEST = 256, 2**15  # how many positions' angles are compared, and up to which: float32 is exact enough there
TOLERANCE = 2**-7  # of cosines and sines that a model keeps in 16 bits


@functools.cache
def calibration() -> Calibration:
    """The one that the variable names; raises FileFormatError, and RecipeError where its recipe has no pages of one size."""
    found = Calibration.from_pretrained(os.environ[VARIABLE])
    sizes: dict[tuple[int, int], set[int]] = {}
    for layer, pair in found.layers.items():
        sizes.setdefault(found.shapes[layer], set()).add(_stream_bytes(pair, found.shapes[layer][1]))
    equal = all(len(size) == 1 and min(size) > 0 for size in sizes.values())
    if not equal or found.recipe.residual_length or found.recipe.sinks > 1:
        raise RecipeError(
            f"Recipe {found.recipe.name} has no pages of one size, which vLLM's are; calibrate with narrow3.0-equal, or any "
            "narrow recipe and --equal-layers."
        )
    return found


def _stream_bytes(pair: tuple[AnyQuantizer, AnyQuantizer], head_dim: int) -> int:
    """Bytes of a token and head of a layer; 0 where keys and values are no streams, or keys are stored rotated."""
    streams = all(isinstance(quantizer, TrellisQuantizer) for quantizer in pair) and pair[0].scheme.transform.pre_rope
    return sum(quantizer.scheme.codes(head_dim) for quantizer in pair) if streams else 0


def quantizers(layer: int, kv_heads: int, head_dim: int, rank: int, ranks: int) -> Pair:
    """Those of a layer's heads in one of several processes; raises CalibrationError where the layer has others."""
    tables = calibration()
    if layer not in tables.shapes:
        raise CalibrationError(f"This calibration has no tables for layer {layer}; calibrate this model.")
    whole = tables.shapes[layer][0]
    part = rank * whole // ranks // kv_heads  # processes beyond the heads have copies of them
    keys, values = tables.for_heads(layer, kv_heads, head_dim, part)
    assert isinstance(keys, TrellisQuantizer) and isinstance(values, TrellisQuantizer)
    return keys, values


def rope_of(keys: TrellisQuantizer, cosines_and_sines: list[tuple[Tensor, bool]]) -> Rope | None:
    """The rotary embedding that keys were calibrated with, as the model has it.

    cosines_and_sines: the model's, of positions from 0 on [positions, rotary_dim], and whether channels of a pair are
    neighbors.
    Raises CalibrationError where it has none such.
    """
    frames = keys.frames
    assert frames is not None
    head_dim = len(frames.channels)
    pairs = int((frames.frequencies > 0).sum())
    if not pairs:
        return None
    for table, interleaved in cosines_and_sines:
        rope = Rope(frames.frequencies[:pairs], float(table[0, 0]), interleaved)
        alike = torch.equal(Frames.of(head_dim, rope.inverse_frequencies, interleaved).channels, frames.channels)
        if alike and table.shape[1] == 2 * pairs:
            last = min(len(table), FARTHEST) - 1
            at = torch.linspace(0, last, POSITIONS, dtype=torch.float64, device="cpu").long()
            expected = torch.cat(rope.cos_sin(at[None], precise=True), dim=-1)[0]
            if torch.allclose(table[at].double(), expected, atol=TOLERANCE * rope.scaling, rtol=0):
                return rope
    raise CalibrationError(
        "This model rotates keys otherwise than the calibration's (its rotary embedding, or how that is scaled, is another); "
        "calibrate the model as it is served."
    )


def require_model(config: Any, folder: str) -> None:
    """Raise CalibrationError unless the calibration is of the model that vLLM serves.

    config: transformers' configuration of its language model. folder: of its weights, which are compared if it is local.
    """
    known = calibration().fingerprint
    heads = config.num_attention_heads
    found = Fingerprint(
        architecture=config.model_type,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        weights=dict(_samples(Path(folder), list(known.weights))),
    )
    known.check(replace(found, few_bits=getattr(config, "quantization_config", None) is not None))


def _samples(folder: Path, names: list[str]) -> Iterator[tuple[str, list[float]]]:
    """Elements of those weights that a folder has in safetensors, as `Fingerprint` samples them."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            stored = list(weights.keys())
            for name in names:
                full = next((own for own in stored if own == name or own.endswith(f".{name}")), None)
                if full is not None:
                    yield name, _sample(weights.get_slice(full))


def _sample(part: Any) -> list[float]:
    shape = part.get_shape()
    rows = part[:] if len(shape) == 1 else None
    width = shape[-1]
    size = width if rows is not None else shape[0] * width
    at = sampled_positions(size).tolist()
    if rows is not None:
        return rows[at].float().tolist()
    return [float(part[i // width : i // width + 1][0, i % width]) for i in at]


def require_plain(refused: dict[str, bool]) -> None:
    """Raise UnsupportedModelError for the first of these that holds."""
    for what, holds in refused.items():
        if holds:
            raise UnsupportedModelError(
                f"NarrowKV's vLLM plug-in does not serve {what}; unset {VARIABLE} to serve this model without it."
            )
