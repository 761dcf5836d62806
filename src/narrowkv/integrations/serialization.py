"""The state of a cache as plain data, and on disk: a prompt read once, stored packed, used again tomorrow or elsewhere.

One safetensors file. Its metadata entry `narrowkv` is JSON: format and version, recipe, checksum of the tables, the model's
fingerprint, lengths, a checksum of the token ids, and a checksum of every tensor. docs/formats.md describes every field.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowkv import tensor_file
from narrowkv.calibration import Fingerprint
from narrowkv.errors import CacheUseError, CalibrationError, FileFormatError
from narrowkv.files import PRIVATE, checksum
from narrowkv.store import LayerStore, PositionBuffer
from narrowkv.store.state import load_tensors, to_tensors

FORMAT, FORMAT_VERSION = "narrowkv-cache", 2
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
MOST_TOKENS = 2**30  # so that positions fit 32 bits
OTHERS = {  # fields of a header that are to be those of the cache, and what is said where they are not
    "shapes": "This cache was saved with other heads by layer than this model has; read the prompt again.",
    "tables_sha256": "This cache was saved with another calibration; load it with the same one.",
    "bias_sha256": "This cache was saved with another bias taken out of keys and values than this model's; read the prompt "
    "again.",
}


@dataclass(frozen=True)
class CacheState:
    """The contents of a packed cache, in memory of its own.

    header: JSON, of what it is. tensors: `rope_state.positions`, `layers.0.keys.plane0`, ...
    """

    header: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int]:
        """Sequences, and tokens of each; raises FileFormatError where a file says nonsense."""
        batch, tokens = (self.header[name] for name in ("batch", "tokens"))
        if any(type(size) is not int or not 1 <= size < MOST_TOKENS for size in (batch, tokens)):
            raise FileFormatError(f"its sizes are no integers from 1 to {MOST_TOKENS:,}")
        return batch, tokens

    def name_prompt(self, token_ids: Tensor | None) -> None:
        """Note the checksum of token_ids [batch, tokens], if given; raises CacheUseError where they are not this many."""
        if token_ids is not None and tuple(token_ids.shape) != self.sizes:
            batch, tokens = self.sizes
            raise CacheUseError(f"The cache has {batch} x {tokens} tokens, but token_ids are {list(token_ids.shape)}.")
        self.header["token_ids_sha256"] = None if token_ids is None else ids_checksum(token_ids)

    def add_positions(self, name: str, position_buffer: PositionBuffer) -> None:
        """Take the entries of a position buffer."""
        self.tensors[f"rope_state.{name}"] = position_buffer.read(position_buffer.first, position_buffer.length).clone(
            memory_format=torch.contiguous_format
        )

    def add_layer(self, i: int, store: LayerStore) -> None:
        """Take the contents of layer i's store; layers come in their order."""
        self.tensors.update({f"layers.{i}.{name}": tensor for name, tensor in to_tensors(store).items()})
        dtypes = [str(dtype).removeprefix("torch.") for dtype in store.dtypes or ()]
        self.header.setdefault("dtypes", []).append(dtypes)

    def require_origin(self, origin: dict[str, Any], token_ids: Tensor | None) -> None:
        """Raise CalibrationError unless this is of the same model, recipe and calibration as a cache. origin: its header.

        token_ids: [batch, tokens], checked against those that were saved; raises CacheUseError. Raises FileFormatError where
        the header is none.
        """
        header = self.header
        try:
            saved, own = (Fingerprint.from_dict(fields["fingerprint"]) for fields in (header, origin))
            self.sizes  # noqa: B018  # refuses nonsense
            _dtypes(header, len(origin["shapes"]))
            if header["recipe"] != origin["recipe"]:
                name = origin["recipe"]["name"]
                raise CalibrationError(f"This cache was saved with another recipe than {name}; load it with the same.")
            saved.check(own)
            if header["rank"] != origin["rank"]:
                raise CalibrationError(
                    f"It has the heads of process {header['rank']}, this is {origin['rank']}; load its own file."
                )
            for name, message in OTHERS.items():
                if header.get(name) != origin[name]:
                    raise CalibrationError(message)
            if header["dtype"] != origin["dtype"]:
                raise CalibrationError(f"This cache was saved by a model in {header['dtype']}; load the model in that dtype.")
            if token_ids is not None and header["token_ids_sha256"] != ids_checksum(token_ids):
                raise CacheUseError(
                    "This cache has another prompt than these token ids; read the prompt with the model instead."
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"its header is not one of a cache ({error})") from error

    def reader(self, device: torch.device) -> "StateReader":
        """What fills stores and position buffers on a device."""
        return StateReader(self, device)


class StateReader:
    """Fills empty stores and position buffers from a state whose origin is right.

    Raises FileFormatError where it is damaged or forged.
    """

    def __init__(self, state: CacheState, device: torch.device):
        self.tensors = {name: tensor.to(device) for name, tensor in state.tensors.items()}
        self.device = device
        self.batch, self.tokens = state.sizes
        shapes = state.header["shapes"]
        self._dtypes = iter(_dtypes(state.header, len(shapes)))

    def take_layer(self, i: int, store: LayerStore, shape: tuple[int, int], sliding_window: int | None) -> None:
        """Fill the store of layer i; layers come in their order. shape: kv_heads and head_dim."""
        prefix = f"layers.{i}."
        own = {name.removeprefix(prefix): self.tensors.pop(name) for name in list(self.tensors) if name.startswith(prefix)}
        load_tensors(store, own, (self.batch, *shape), next(self._dtypes), self.device)
        if store.length != self.tokens:
            raise FileFormatError(f"layer {i} has {store.length} tokens, not {self.tokens}")
        if store.oldest > max(self.tokens - (sliding_window or self.tokens + 1) + 1, 0):
            raise FileFormatError(f"layer {i} has evicted tokens that it needs")

    def take_positions(self, name: str, position_buffer: PositionBuffer, head_dim: int, needed: int) -> None:
        """Fill a position buffer. head_dim: the least of the layers that read it; needed: the first token that they read."""
        entries = self.tensors.pop(f"rope_state.{name}", None)
        if entries is None:
            raise FileFormatError(f"rope_state.{name} is missing")
        if not self._are_positions(name, entries, head_dim):
            raise FileFormatError(f"rope_state.{name} is not what is stored of {self.batch} x {self.tokens} tokens")
        tensor_file.require_finite(f"rope_state.{name}", entries)
        position_buffer.first = position_buffer.length = self.tokens - entries.shape[1]
        if position_buffer.first > needed:
            raise FileFormatError(f"rope_state.{name} has evicted tokens that are needed")
        position_buffer.append(entries)

    def _are_positions(self, name: str, entries: Tensor, head_dim: int) -> bool:
        """Whether entries [batch, tokens, ...] are those of positions, or of angles that rotate a head."""
        if entries.dim() < 2 or len(entries) != self.batch or not 1 <= entries.shape[1] <= self.tokens:
            return False
        if name == "positions":
            return entries.dim() == 2 and entries.dtype == torch.int32 and bool((entries >= 0).all())
        angles = entries.dim() == 4 and entries.shape[2] == 2 and entries.is_floating_point()
        return angles and 0 < 2 * entries.shape[3] <= head_dim

    def require_empty(self) -> None:
        """Raise FileFormatError where something is left."""
        if self.tensors:
            raise FileFormatError(f"tensor {min(self.tensors)} does not belong to a cache")


def write_state(state: CacheState, path: Path) -> None:
    """Write a state to one file; raises OutputError where that fails."""
    tensor_file.write(path, {"format": FORMAT, "format_version": FORMAT_VERSION, **state.header}, state.tensors, PRIVATE)


def read_state(path: Path) -> CacheState:
    """Read a state; raises FileFormatError where the file is missing, damaged or of another version."""
    return CacheState(*tensor_file.read(path, FORMAT, FORMAT_VERSION))


def _dtypes(header: dict[str, Any], layers: int) -> list[tuple[torch.dtype, torch.dtype]]:
    """In which dtypes keys and values came to each layer."""
    named = header["dtypes"]
    if not isinstance(named, list) or len(named) != layers:
        raise FileFormatError("its dtypes are not those of its layers")
    pairs = [tuple(DTYPES.get(name) for name in pair if isinstance(name, str)) for pair in named if isinstance(pair, list)]
    found = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2 and pair[0] and pair[1]]
    if len(found) != layers:
        raise FileFormatError("its dtypes are not those of keys and values")
    return found


def tensors_checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over tensors, in order."""
    return checksum("".join(tensor_file.tensor_checksum(tensor.cpu()) for tensor in tensors).encode())


def ids_checksum(token_ids: Tensor) -> str:
    """SHA-256 over token ids."""
    return tensor_file.tensor_checksum(token_ids.detach().cpu().to(torch.int64))
