"""A model's checkpoint with scales in it, as compressed-tensors, vLLM and SGLang read them."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from narrowkv import hub
from narrowkv.errors import UnsupportedModelError
from narrowkv.exports.ranges import Ranges
from narrowkv.exports.static_scales import StaticQuantization
from narrowkv.files import link_or_copy, read_json, write_atomically, write_json, written_at_once
from narrowkv.integrations.folders import CONFIG, INDEX
from narrowkv.integrations.models import model_folder
from narrowkv.integrations.probe import ModelInfo

WEIGHTS, RENAMED, SCALES = "model.safetensors", "model-weights.safetensors", "model-kv-scales.safetensors"
TYPES = {"int8": "int", "int4": "int", "fp8": "float"}
STRATEGIES = {"tensor": "tensor", "head": "attn_head"}
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "README*")  # besides the weights


def checkpoint_folder(name: str) -> Path:
    """The local folder of a model's safetensors, read from the hub where `name` is an id of it.

    Raises UnsupportedModelError where there is none, or where its weights are quantized already.
    """
    folder = Path(model_folder(name))
    if not folder.exists():
        folder = hub.download(name, "*.safetensors", *COPIED)
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        raise UnsupportedModelError(
            f"{name} has no {WEIGHTS} that scales could be stored alongside; give a folder of safetensors, or choose "
            "--format onnxruntime-genai."
        )
    if "quantization_config" in read_json(folder / CONFIG):
        raise UnsupportedModelError(
            f"The weights of {name} are quantized already, and a checkpoint has one quantization_config; export the model "
            "that they were made from."
        )
    return folder


def write_checkpoint(
    out: Path,
    source: Path,
    model: nn.Module,
    info: ModelInfo,
    quantization: StaticQuantization,
    ranges: Sequence[Ranges],
) -> None:
    """Write a folder with the source's weights, linked where that can be, and `k_scale` and `v_scale` of every layer.

    The whole folder appears at once. Raises OutputError where it has files already or cannot be written,
    UnsupportedModelError where a layer has no name that an engine would look for.
    """
    files, size = _weight_files(source)
    scales = scale_tensors(model, info, quantization, ranges, set(files))
    files = {name: RENAMED if file == WEIGHTS else file for name, file in files.items()} | dict.fromkeys(scales, SCALES)
    size += sum(scale.nbytes for scale in scales.values())
    config = read_json(source / CONFIG) | {"quantization_config": quantization_config(quantization)}
    with written_at_once(out) as folder:
        for file in _files_to_copy(source):
            shutil.copyfile(file, folder / file.name)
        for name in sorted(set(files.values()) - {SCALES}):
            link_or_copy(source / (WEIGHTS if name == RENAMED else name), folder / name)
        write_atomically(folder / SCALES, lambda temporary: save_file(scales, temporary, {"format": "pt"}))
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))})
        write_json(folder / CONFIG, config)


def quantization_config(quantization: StaticQuantization) -> dict[str, Any]:
    """What config.json says of a checkpoint of which nothing but keys and values is quantized."""
    scheme = {
        "num_bits": quantization.bits,
        "type": TYPES[quantization.datatype],
        "strategy": STRATEGIES[quantization.strategy],
        "symmetric": True,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": scheme,
    }


def scale_tensors(
    model: nn.Module, info: ModelInfo, quantization: StaticQuantization, ranges: Sequence[Ranges], weights: set[str]
) -> dict[str, Tensor]:
    """`k_scale` and `v_scale` by their names in a checkpoint: [1] or, for each head, [kv_heads, 1, 1] float32.

    weights: names in the checkpoint. Raises UnsupportedModelError where it names attention modules otherwise than the model,
    or where layers read keys of others, whose scales engines would not find.
    """
    if info.readers:
        raise UnsupportedModelError(
            "Layers of this model read keys of other layers, and engines look for scales of their own; choose --format "
            "onnxruntime-genai."
        )
    names = {id(module): name for name, module in model.named_modules()}
    shape = (-1, 1, 1) if quantization.strategy == "head" else (1,)
    tensors = {}
    for layer, one in zip(info.attention, ranges, strict=True):
        name = names[id(layer.module)]
        if not any(weight.startswith(f"{name}.") for weight in weights):
            raise UnsupportedModelError(
                f"The checkpoint has no weights named {name}, so an engine would not find scales of that name; export a "
                "checkpoint that save_pretrained wrote."
            )
        for part, largest in (("k_scale", one.keys), ("v_scale", one.values)):
            tensors[f"{name}.{part}"] = quantization.scales(largest).reshape(shape).cpu().contiguous()
    return tensors


def _weight_files(source: Path) -> tuple[dict[str, str], int]:
    """The file of each tensor by its name, and bytes of all."""
    if (source / WEIGHTS).is_file():  # which transformers prefers where there is an index too
        with safe_open(source / WEIGHTS, framework="pt") as file:
            return dict.fromkeys(file.keys(), WEIGHTS), (source / WEIGHTS).stat().st_size
    files = read_json(source / INDEX)["weight_map"]
    return files, sum((source / file).stat().st_size for file in set(files.values()))


def _files_to_copy(source: Path) -> Iterator[Path]:
    """The files of a checkpoint that are copied as they are."""
    named = {file for pattern in COPIED for file in source.glob(pattern) if file.is_file()}
    return (file for file in sorted(named) if file.name not in (CONFIG, INDEX))
