"""ONNX Runtime GenAI's `kv_cache_scale_file`: scales of every layer as JSON."""

from collections.abc import Sequence
from pathlib import Path

from narrowkv.exports.ranges import Ranges
from narrowkv.exports.static_scales import StaticQuantization
from narrowkv.files import write_json
from narrowkv.integrations.probe import ModelInfo

FILE = "kv_scales.json"
QMAX = {"int8": 128.0, "int4": 8.0, "fp8": 448.0}  # by which the builder tells what scales were made for


def write_scale_file(folder: Path, info: ModelInfo, quantization: StaticQuantization, ranges: Sequence[Ranges]) -> Path:
    """Write `kv_scales.json` into a folder, atomically, and return its path; raises OutputError.

    An entry is a list of kv_heads * head_dim scales with strategy channel, of one with tensor.
    """
    scales = {
        "k_scales": [quantization.scales(one.keys).flatten().tolist() for one in ranges],
        "v_scales": [quantization.scales(one.values).flatten().tolist() for one in ranges],
    }
    layers = [layer.layer for layer in info.attention]
    write_json(folder / FILE, {"scales": scales, "layer_ids": layers, "qmax": QMAX[quantization.datatype]})
    return folder / FILE
