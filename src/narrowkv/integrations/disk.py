"""Caches on disk: a prompt read once, kept packed, used again tomorrow or by another process.

One safetensors file. Its metadata entry `narrowkv` is JSON: format and version, recipe, checksum of the tables, the model's
fingerprint, lengths, a checksum of the token ids, and a checksum of every tensor. docs/formats.md tells field by field.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from narrowkv.calibration import Fingerprint
from narrowkv.codec import AnyQuantizer
from narrowkv.errors import CacheUseError, CalibrationError, FileFormatError, NarrowKVError
from narrowkv.files import PRIVATE, checksum, write_atomically
from narrowkv.integrations.versions import keeps_nothing
from narrowkv.store.state import load_tensors, to_tensors

if TYPE_CHECKING:
    from narrowkv.integrations.cache import PackedCache

FORMAT, FORMAT_VERSION = "narrowkv-cache", 1
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
AGAIN = "read the prompt again and save the cache anew"


def save_cache(cache: "PackedCache", path: str | Path, token_ids: Tensor | None = None) -> None:
    """Write a cache to one file; token_ids: [batch, tokens] that it holds, whose checksum goes with it.

    Raises CacheUseError while the cache is empty or token_ids do not fit it, OutputError where writing fails.
    """
    length = cache.length
    if length == 0:
        raise CacheUseError("The cache is empty, there is nothing to save; let the model read a prompt first.")
    _require_attention_only(cache)
    if token_ids is not None and tuple(token_ids.shape) != (cache.batch_size, length):
        raise CacheUseError(
            f"The cache holds {cache.batch_size} x {length} tokens, but token_ids are {list(token_ids.shape)}."
        )
    tensors = {f"ledger.{name}": ledger.read(ledger.first, length).contiguous() for name, ledger in cache.ledgers.items()}
    for i, layer in zip(cache.modules, cache.packed, strict=True):
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in to_tensors(layer.store).items()}
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "recipe": cache.recipe.to_dict(),
        "tables_sha256": tables_checksum([layer.store.quantizers for layer in cache.packed]),
        "fingerprint": asdict(cache.fingerprint),
        "dtype": _name(cache.model_dtype),
        "dtypes": [[_name(dtype) for dtype in layer.store.dtypes or ()] for layer in cache.packed],
        "batch": cache.batch_size,
        "rank": cache.rank,
        "shapes": [list(shape) for shape in cache.shapes],
        "tokens": length,
        "token_ids_sha256": None if token_ids is None else ids_checksum(token_ids),
        "tensors_sha256": {name: tensor_checksum(tensor) for name, tensor in sorted(tensors.items())},
    }
    header["header_sha256"] = checksum(json.dumps(header, sort_keys=True).encode())
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, {"narrowkv": json.dumps(header)}), PRIVATE)


def _require_attention_only(cache: "PackedCache") -> None:
    others = [i for i, layer in enumerate(cache.layers) if i not in cache.modules and not keeps_nothing(layer)]
    if others:
        raise CacheUseError(
            f"Layers {', '.join(map(str, others))} keep a state of their own (linear attention, convolution), which cannot be "
            "saved; read the prompt anew instead."
        )


def load_cache(cache: "PackedCache", path: str | Path, token_ids: Tensor | None = None) -> None:
    """Fill an empty cache, made for the model and with the calibration or recipe at hand, from a file.

    token_ids: [batch, tokens], checked against those that were saved. Raises FileFormatError where the file is missing,
    damaged, hostile or of another version, CalibrationError where it is of another model, recipe or calibration.
    """
    try:
        header, tensors = _read(Path(path), cache.device)
        _check_origin(cache, header, token_ids)
        held = zip(cache.modules, cache.packed, cache.shapes, _dtypes(header, len(cache.packed)), strict=True)
        for i, layer, (heads, dim), dtypes in held:
            shape = (header["batch"], heads, dim)
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            load_tensors(layer.store, own, shape, dtypes)
            if layer.store.length != header["tokens"]:
                raise FileFormatError(f"layer {i} holds {layer.store.length} tokens, not {header['tokens']}")
            window = layer.sliding_window or header["tokens"] + 1
            if layer.store.first > max(header["tokens"] - window + 1, 0):
                raise FileFormatError(f"layer {i} has forgotten tokens that it needs")
        for name, ledger in cache.ledgers.items():
            entries = tensors.pop(f"ledger.{name}", None)
            needed = header["tokens"] - cache.first_needed(ledger)
            if entries is None or len(entries) != header["batch"] or entries.shape[1] < needed:
                raise FileFormatError(f"ledger.{name} is missing or does not fit the tokens")
            ledger.first = ledger.length = header["tokens"] - entries.shape[1]
            if ledger.first < 0:
                raise FileFormatError(f"ledger.{name} has more entries than there are tokens")
            if name == "positions" and (entries.dtype != torch.int32 or bool((entries < 0).any())):
                raise FileFormatError("positions are not whole numbers from 0")
            ledger.append(entries)
        if tensors:
            raise FileFormatError(f"tensor {min(tensors)} does not belong to a cache")
    except NarrowKVError as error:
        cache.reset()
        if isinstance(error, FileFormatError):
            raise FileFormatError(f"{path} cannot be loaded: {error}; {AGAIN}.") from error
        raise


def _read(path: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors, once every checksum has been found right."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("narrowkv", "null"))
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise FileFormatError("it is not a NarrowKV cache")
            if header.get("format_version") != FORMAT_VERSION:
                raise FileFormatError(f"it has format {header.get('format_version')!r}, this NarrowKV reads {FORMAT_VERSION}")
            content = {name: part for name, part in header.items() if name != "header_sha256"}
            if header.get("header_sha256") != checksum(json.dumps(content, sort_keys=True).encode()):
                raise FileFormatError("its header was altered (checksum differs)")
            expected = header["tensors_sha256"]
            if set(expected) != set(file.keys()):
                raise FileFormatError("its tensors are not those that its header names")
            tensors = {}
            for name in expected:
                tensors[name] = file.get_tensor(name)
                if tensor_checksum(tensors[name]) != expected[name]:
                    raise FileFormatError(f"tensor {name} was altered (checksum differs)")
                tensors[name] = tensors[name].to(device)
    except (OSError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FileFormatError(f"it is missing, truncated or damaged ({str(error).splitlines()[0]})") from error
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, NarrowKVError):
            raise
        raise FileFormatError(f"its header is not one of a cache ({error})") from error
    return header, tensors


def _check_origin(cache: "PackedCache", header: dict[str, Any], token_ids: Tensor | None) -> None:
    try:
        saved = Fingerprint(**header["fingerprint"])
        sizes = [header[name] for name in ("batch", "tokens")]
        if any(type(size) is not int or size < 1 for size in sizes):
            raise FileFormatError("its sizes are not positive numbers")
        if header["recipe"] != json.loads(json.dumps(cache.recipe.to_dict())):
            raise CalibrationError(
                f"This cache was saved with another recipe than {cache.recipe.name}; load it with the same."
            )
        saved.check(cache.fingerprint)
        if header["rank"] != cache.rank:
            raise CalibrationError(f"It holds the heads of process {header['rank']}, this is {cache.rank}; load its own file.")
        if header["shapes"] != [list(shape) for shape in cache.shapes]:
            raise CalibrationError(
                "This cache was saved with other heads by layer than this model has; read the prompt again."
            )
        if header["tables_sha256"] != tables_checksum([layer.store.quantizers for layer in cache.packed]):
            raise CalibrationError("This cache was saved with another calibration; load it with the same one.")
        if header["dtype"] != _name(cache.model_dtype):
            raise CalibrationError(f"This cache was saved by a model in {header['dtype']}; load the model in that dtype.")
        if token_ids is not None and header["token_ids_sha256"] != ids_checksum(token_ids):
            raise CacheUseError(
                "This cache holds another prompt than these token ids; read the prompt with the model instead."
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"its header is not one of a cache ({error})") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(header: dict[str, Any], layers: int) -> list[tuple[torch.dtype, torch.dtype]]:
    """In which dtypes keys and values came to each layer; 0.1 had one for all."""
    named = header.get("dtypes", [[header["dtype"]] * 2] * layers)
    if not isinstance(named, list) or len(named) != layers:
        raise FileFormatError("its dtypes are not those of its layers")
    pairs = [tuple(DTYPES.get(name) for name in pair if isinstance(name, str)) for pair in named if isinstance(pair, list)]
    found = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2 and pair[0] and pair[1]]
    if len(found) != layers:
        raise FileFormatError("its dtypes are not those of keys and values")
    return found


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return checksum(head + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def tables_checksum(layers: list[tuple[AnyQuantizer, AnyQuantizer]]) -> str:
    """SHA-256 over all tables, in order."""
    parts = [tensor_checksum(table.cpu()) for pair in layers for quantizer in pair for table in quantizer.tensors().values()]
    return checksum("".join(parts).encode())


def ids_checksum(token_ids: Tensor) -> str:
    """SHA-256 over token ids."""
    return tensor_checksum(token_ids.detach().cpu().to(torch.int64))
