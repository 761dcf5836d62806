"""Calibration: the tables learned offline for one model and recipe, in memory and on disk."""

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowkv import hub, tensor_file
from narrowkv.calibration.fingerprint import Fingerprint
from narrowkv.codec import AnyQuantizer, load_quantizer
from narrowkv.errors import CalibrationError, FileFormatError, NarrowKVError, RecipeError
from narrowkv.files import PUBLIC, reason
from narrowkv.methods import Recipe

FORMAT, FORMAT_VERSION, FILE = "narrowkv-calibration", 3, "narrowkv.safetensors"
SIDES = ("keys", "values")
MOST_SIZE = 2**16  # layers, heads, or channels of a head


@dataclass(frozen=True, eq=False)
class Calibration:
    """Quantizers for the keys and values of every layer, learned from one model.

    recipe: the recipe that they implement. fingerprint: identifies the model. layers: quantizers (keys, values) of each
    attention layer by its index. shapes: kv_heads and head_dim of each such layer. provenance: number of tokens and other
    facts on how it was made, as plain data.
    """

    recipe: Recipe
    fingerprint: Fingerprint
    layers: dict[int, tuple[AnyQuantizer, AnyQuantizer]] = field(repr=False)
    shapes: dict[int, tuple[int, int]] = field(repr=False)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same tables for the same model, whatever their provenance."""
        if not isinstance(other, Calibration):
            return NotImplemented
        alike = (self.recipe, self.fingerprint, self.shapes) == (other.recipe, other.fingerprint, other.shapes)
        return alike and all(
            one.tensors().keys() == two.tensors().keys()
            and all(torch.equal(table, two.tensors()[name]) for name, table in one.tensors().items())
            for layer in self.layers
            for one, two in zip(self.layers[layer], other.layers[layer], strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def quantizers(self, layer: int) -> tuple[AnyQuantizer, AnyQuantizer]:
        """Quantizers for the keys and values of one layer; raises CalibrationError if it was not calibrated."""
        if layer not in self.layers:
            raise CalibrationError(f"This calibration has no tables for layer {layer}; calibrate this model again.")
        return self.layers[layer]

    def for_heads(self, layer: int, kv_heads: int, head_dim: int, rank: int) -> tuple[AnyQuantizer, AnyQuantizer]:
        """Quantizers of one layer for process `rank` of several, each of which has `kv_heads` of its heads.

        Raises CalibrationError if the layer's heads have another size or cannot be divided like this.
        """
        pair, (whole, dim) = self.quantizers(layer), self.shapes[layer]
        if dim != head_dim:
            raise CalibrationError(
                f"This calibration has heads of {dim} channels in layer {layer}, not of {head_dim}; calibrate this model."
            )
        if kv_heads == whole:
            return pair
        if whole % kv_heads or (rank + 1) * kv_heads > whole:
            raise CalibrationError(
                f"This calibration has {whole} KV heads in layer {layer}, of which {kv_heads} cannot be the part of process "
                f"{rank}; calibrate this model."
            )
        keys, values = (quantizer.of_heads(rank * kv_heads, kv_heads) for quantizer in pair)
        return keys, values

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `narrowkv.safetensors` into a folder, atomically; raises OutputError if that fails."""
        tensors = {
            f"layers.{i}.{side}.{name}": tensor
            for i, pair in self.layers.items()
            for side, quantizer in zip(SIDES, pair, strict=True)
            for name, tensor in quantizer.tensors().items()
        }
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe.to_dict(),
            "fingerprint": asdict(self.fingerprint),
            "provenance": self.provenance,
            "shapes": {str(layer): list(shape) for layer, shape in self.shapes.items()},
        }
        tensor_file.write(Path(folder) / FILE, header, tensors, PUBLIC)

    @classmethod
    def from_pretrained(cls, name: str | Path, model: nn.Module | None = None) -> "Calibration":
        """Read a calibration from a local folder or, if there is none with that name, from the Hugging Face hub.

        Raises FileFormatError if the file is missing, damaged or of another version, CalibrationError if `model` is given and
        is not the one that was calibrated (creating a cache checks this again).
        """
        folder = Path(name)
        if not folder.exists():
            folder = hub.download(str(name), FILE)
        path = folder / FILE
        if folder.is_dir() and not path.exists():
            raise FileFormatError(f"{folder} has no {FILE}; name a folder that `save_pretrained` wrote.")
        header, tensors = tensor_file.read(path, FORMAT, FORMAT_VERSION)
        try:
            loaded = cls._assemble(header, tensors)
        except (KeyError, TypeError, ValueError, AttributeError, NarrowKVError) as error:
            raise FileFormatError(f"{path} has no usable calibration ({reason(error)}); calibrate again.") from error
        if model is not None:
            loaded.fingerprint.check(Fingerprint.of(model))
        return loaded

    @classmethod
    def _assemble(cls, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> "Calibration":
        """Raises some error where header and tensors, which anybody may have written, do not go together."""
        recipe, provenance = Recipe.from_dict(header["recipe"]), header["provenance"]
        if not isinstance(provenance, dict):
            raise FileFormatError("provenance is no JSON object")
        layers, left, shapes = {}, dict(tensors), _shapes(header["shapes"])
        recipe.require_layers(sorted(shapes))
        for i, shape in shapes.items():
            schemes = recipe.schemes(i)
            pair = []
            for side, scheme in zip(SIDES, (schemes.keys, schemes.values), strict=True):
                prefix = f"layers.{i}.{side}."
                tables = {name.removeprefix(prefix): left.pop(name) for name in list(left) if name.startswith(prefix)}
                try:
                    pair.append(load_quantizer(scheme, tables, *shape))
                except RecipeError as error:
                    raise FileFormatError(f"{prefix[:-1]}: {error}") from error
            layers[i] = (pair[0], pair[1])
        if left:
            raise FileFormatError(f"tensor {min(left)} does not belong to its recipe")
        return cls(recipe, Fingerprint.from_dict(header["fingerprint"]), layers, shapes, provenance)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the file to a model repository on the Hugging Face hub; returns its address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            message = f"NarrowKV calibration {self.recipe.name}"
            return hub.upload(repo_id, folder, message, private=private, token=token)


def _shapes(plain: dict[str, Any]) -> dict[int, tuple[int, int]]:
    """kv_heads and head_dim of each layer, from a file; raises FileFormatError where they are none of any model."""
    shapes = {int(layer): (heads, dim) for layer, (heads, dim) in plain.items()}
    sizes = [size for layer, shape in shapes.items() for size in (layer + 1, *shape)]
    if not shapes or any(type(size) is not int or not 1 <= size <= MOST_SIZE for size in sizes):
        raise FileFormatError("its shapes are those of no model")
    return shapes
