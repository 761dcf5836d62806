"""The scale file, against what ONNX Runtime GenAI's model builder documents and checks."""

import json
import math

import pytest
import torch

from narrowkv.exports import StaticQuantization, observe_ranges
from narrowkv.exports.scale_file import write_scale_file
from narrowkv.integrations.preparation import model_info_for


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("datatype", ["int8", "int4", "fp8"])
def test_the_file_is_as_published(tiny, tmp_path, datatype, strategy):
    model, quantization = tiny(layers=3), StaticQuantization(datatype, strategy)
    info = model_info_for(model, "auto", [])
    ranges = observe_ranges(model, info, [torch.randint(2, 97, (1, 40))])
    path = write_scale_file(tmp_path / "new", info, quantization, ranges)
    read = json.loads(path.read_text())
    assert set(read) == {"scales", "layer_ids", "qmax"} and set(read["scales"]) == {"k_scales", "v_scales"}
    assert read["layer_ids"] == [0, 1, 2] and read["qmax"] == {"int8": 128, "int4": 8, "fp8": 448}[datatype]
    for name, side in (("k_scales", "keys"), ("v_scales", "values")):
        for layer, scales in enumerate(read["scales"][name]):
            assert len(scales) == (2 * 16 if strategy == "channel" else 1)
            assert all(math.isfinite(scale) and scale > 0 for scale in scales)
            expected = quantization.scales(getattr(ranges[layer], side)).flatten()
            assert torch.equal(torch.tensor(scales, dtype=torch.float32), expected)  # heads one after the other
    assert [file.name for file in path.parent.iterdir()] == ["kv_scales.json"]
