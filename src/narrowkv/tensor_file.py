"""Safetensors files that describe themselves: JSON in the metadata, and checksums of it and of every tensor."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from narrowkv.errors import FileFormatError
from narrowkv.files import checksum, reason, require_readable, write_atomically

ENTRY = "narrowkv"  # of the metadata


def write(path: Path, header: dict[str, Any], tensors: dict[str, Tensor], mode: int) -> None:
    """Write tensors and a header, plain data with `format` and `format_version`, atomically; raises OutputError."""
    stored = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(stored, temporary, {ENTRY: json.dumps(sign(header, stored))}), mode)


def sign(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The header with checksums of the tensors, and of itself."""
    sums = {name: tensor_checksum(tensor) for name, tensor in sorted(tensors.items())}
    signed = {name: part for name, part in header.items() if name != "header_sha256"} | {"tensors_sha256": sums}
    return signed | {"header_sha256": checksum(json.dumps(signed, sort_keys=True).encode())}


def read(path: Path, format: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors, in memory of their own, once every checksum has been found right.

    Raises FileFormatError where the file cannot be read, is damaged, or is of another format or version.
    """
    require_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(ENTRY, "null"))
            if not isinstance(header, dict) or header.get("format") != format:
                raise FileFormatError(f"{path} is not a {format} file; name one that NarrowKV wrote.")
            if header.get("format_version") != version:
                raise FileFormatError(
                    f"{path} has format {header.get('format_version')!r}, this NarrowKV reads {version}; make it anew, or "
                    "install the version that wrote it."
                )
            unsigned = {name: part for name, part in header.items() if name != "header_sha256"}
            if header.get("header_sha256") != checksum(json.dumps(unsigned, sort_keys=True).encode()):
                raise FileFormatError(f"The header of {path} was altered (checksum differs); make it anew or copy it again.")
            expected = header["tensors_sha256"]
            if set(expected) != set(file.keys()):
                raise FileFormatError(f"The tensors of {path} are not those that its header names; make it anew.")
            # copied: what was checked must not change with the file, and of a truth any byte becomes 0 or 1
            tensors = {name: file.get_tensor(name).clone() for name in expected}
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"{path} is truncated or damaged ({reason(error)}); make it anew or copy it again.") from error
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, RecursionError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path} has contents that NarrowKV never writes ({reason(error)}); make it anew.") from error
    for name, tensor in tensors.items():
        if tensor_checksum(tensor) != expected[name]:
            raise FileFormatError(f"Tensor {name} of {path} was altered (checksum differs); make it anew or copy it again.")
    return header, tensors


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return checksum(head + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise FileFormatError, which begins with the tensor's name, where one is NaN or infinite."""
    if tensor.is_floating_point() and not bool((tensor if tensor.itemsize > 1 else tensor.float()).isfinite().all()):
        raise FileFormatError(f"tensor {name} has NaN or infinity")
