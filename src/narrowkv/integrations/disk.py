"""Caches on disk: a prompt read once, kept packed, used again tomorrow or by another process.

One safetensors file. Its metadata entry `narrowkv` is JSON: format and version, recipe, checksum of the tables, the model's
fingerprint, lengths, a checksum of the token ids, and a checksum of every tensor. docs/formats.md tells field by field.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from narrowkv import tensor_file
from narrowkv.calibration import Fingerprint
from narrowkv.codec import AnyQuantizer
from narrowkv.errors import CacheUseError, CalibrationError, FileFormatError, NarrowKVError
from narrowkv.files import PRIVATE, checksum
from narrowkv.integrations.versions import keeps_nothing
from narrowkv.store.state import load_tensors, to_tensors

if TYPE_CHECKING:
    from narrowkv.integrations.cache import PackedCache

FORMAT, FORMAT_VERSION = "narrowkv-cache", 1
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
MOST_TOKENS = 2**30  # so that positions fit 32 bits
AGAIN = "read the prompt again and save the cache anew"


def save_cache(cache: "PackedCache", path: str | Path, token_ids: Tensor | None = None) -> None:
    """Write a cache to one file; token_ids: [batch, tokens] that it holds, whose checksum goes with it.

    Raises CacheUseError while the cache is empty or token_ids do not fit it, OutputError where writing fails.
    """
    cache.hold.require()
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
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "recipe": cache.recipe.to_dict(),
        "tables_sha256": tables_checksum([layer.store.quantizers for layer in cache.packed]),
        "bias_sha256": bias_checksum(cache),
        "fingerprint": asdict(cache.fingerprint),
        "dtype": _name(cache.model_dtype),
        "dtypes": [[_name(dtype) for dtype in layer.store.dtypes or ()] for layer in cache.packed],
        "batch": cache.batch_size,
        "rank": cache.rank,
        "shapes": [list(shape) for shape in cache.shapes],
        "tokens": length,
        "token_ids_sha256": None if token_ids is None else ids_checksum(token_ids),
    }
    tensor_file.write(Path(path), header, tensors, PRIVATE)


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
    header, tensors = tensor_file.read(Path(path), FORMAT, FORMAT_VERSION)
    try:
        _check_origin(cache, header, token_ids)
        tensors = {name: tensor.to(cache.device) for name, tensor in tensors.items()}
        held = zip(cache.modules, cache.packed, cache.shapes, _dtypes(header, len(cache.packed)), strict=True)
        for i, layer, (heads, dim), dtypes in held:
            shape = (header["batch"], heads, dim)
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            load_tensors(layer.store, own, shape, dtypes)
            if layer.store.length != header["tokens"]:
                raise FileFormatError(f"layer {i} holds {layer.store.length} tokens, not {header['tokens']}")
            window = layer.sliding_window or header["tokens"] + 1
            if layer.store.oldest > max(header["tokens"] - window + 1, 0):
                raise FileFormatError(f"layer {i} has forgotten tokens that it needs")
        for name, ledger in cache.ledgers.items():
            entries = tensors.pop(f"ledger.{name}", None)
            if entries is None:
                raise FileFormatError(f"ledger.{name} is missing")
            _check_ledger(cache, name, entries, header)
            ledger.first = ledger.length = header["tokens"] - entries.shape[1]
            if ledger.first > cache.first_needed(ledger):
                raise FileFormatError(f"ledger.{name} has forgotten tokens that are needed")
            ledger.append(entries)
        if tensors:
            raise FileFormatError(f"tensor {min(tensors)} does not belong to a cache")
    except NarrowKVError as error:
        cache.reset()
        if isinstance(error, FileFormatError):
            raise FileFormatError(f"{path} cannot be loaded: {error}; {AGAIN}.") from error
        raise


def _check_ledger(cache: "PackedCache", name: str, entries: Tensor, header: dict[str, Any]) -> None:
    """Raise FileFormatError unless entries [batch, tokens, ...] are those of positions, or of angles that turn a head."""
    fits = entries.dim() >= 2 and len(entries) == header["batch"] and 1 <= entries.shape[1] <= header["tokens"]
    if fits and name == "positions":
        fits = entries.dim() == 2 and entries.dtype == torch.int32 and bool((entries >= 0).all())
    elif fits:
        least = min(
            dim for layer, (_, dim) in zip(cache.packed, cache.shapes, strict=True) if layer.ledger is cache.ledgers[name]
        )
        fits = (
            entries.dim() == 4 and entries.shape[2] == 2 and 0 < 2 * entries.shape[3] <= least and entries.is_floating_point()
        )
    if not fits:
        raise FileFormatError(f"ledger.{name} is not what is kept of {header['batch']} x {header['tokens']} tokens")
    tensor_file.require_numbers(f"ledger.{name}", entries)


def _check_origin(cache: "PackedCache", header: dict[str, Any], token_ids: Tensor | None) -> None:
    try:
        saved = Fingerprint.from_dict(header["fingerprint"])
        sizes = [header[name] for name in ("batch", "tokens")]
        if any(type(size) is not int or not 1 <= size < MOST_TOKENS for size in sizes):
            raise FileFormatError(f"its sizes are no whole numbers from 1 to {MOST_TOKENS:,}")
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
        if header.get("bias_sha256") != bias_checksum(cache):
            raise CalibrationError(
                "This cache was saved with another bias taken out of keys and values than this model's; read the prompt again."
            )
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


def tables_checksum(layers: list[tuple[AnyQuantizer, AnyQuantizer]]) -> str:
    """SHA-256 over all tables, in order."""
    parts = [
        tensor_file.tensor_checksum(table.cpu())
        for pair in layers
        for quantizer in pair
        for table in quantizer.tensors().values()
    ]
    return checksum("".join(parts).encode())


def bias_checksum(cache: "PackedCache") -> str | None:
    """SHA-256 over what is taken out of keys and values, None where that is nothing."""
    parts = [tensor_file.tensor_checksum(part.cpu()) for layer in cache.packed for part in layer.store.bias.tensors()]
    return checksum("".join(parts).encode()) if parts else None


def ids_checksum(token_ids: Tensor) -> str:
    """SHA-256 over token ids."""
    return tensor_file.tensor_checksum(token_ids.detach().cpu().to(torch.int64))
