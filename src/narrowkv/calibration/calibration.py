"""Calibration: what was learned offline for one model under one recipe, in memory and on disk."""

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from narrowkv.calibration.fingerprint import Fingerprint
from narrowkv.codec import AnyQuantizer, quantizer_for
from narrowkv.errors import CalibrationError, FileFormatError, NarrowKVError
from narrowkv.files import checksum, read_json, write_atomically, write_json
from narrowkv.methods import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from narrowkv.integrations import PackedCache

FORMAT_VERSION = 1
DESCRIPTION_FILE, TENSOR_FILE = "narrowkv.json", "narrowkv.safetensors"


@dataclass(frozen=True)
class Calibration:
    """Quantizers for the keys and the values of every layer.

    recipe: what they implement. fingerprint: of the model they were learned from. layers: (keys, values) of each attention
    layer by its number. shapes: kv_heads and head_dim of each such layer.
    provenance: tokens seen and the like, plain data for people.
    """

    recipe: Recipe
    fingerprint: Fingerprint
    layers: dict[int, tuple[AnyQuantizer, AnyQuantizer]] = field(repr=False)
    shapes: dict[int, tuple[int, int]] = field(repr=False)
    provenance: dict[str, Any] = field(default_factory=dict)

    def quantizers(self, layer: int) -> tuple[AnyQuantizer, AnyQuantizer]:
        """Quantizers for the keys and values of one layer; raises CalibrationError where it was not calibrated."""
        if layer not in self.layers:
            raise CalibrationError(f"This calibration has no tables for layer {layer}; calibrate this model again.")
        return self.layers[layer]

    def for_heads(self, layer: int, kv_heads: int, rank: int) -> tuple[AnyQuantizer, AnyQuantizer]:
        """Quantizers of one layer for process `rank` of several that hold `kv_heads` of its heads each.

        Raises CalibrationError where the layer's heads cannot be divided so.
        """
        pair, whole = self.quantizers(layer), self.shapes[layer][0]
        if kv_heads == whole:
            return pair
        if whole % kv_heads or (rank + 1) * kv_heads > whole:
            raise CalibrationError(
                f"This calibration has {whole} KV heads in layer {layer}, of which {kv_heads} cannot be the part of process "
                f"{rank}; calibrate this model."
            )
        keys, values = (quantizer.of_heads(rank * kv_heads, kv_heads) for quantizer in pair)
        return keys, values

    def cache(self, model: "PreTrainedModel", **options: Any) -> "PackedCache":
        """A new cache for `model`, for `model.generate(past_key_values=...)`; options as of `narrowkv.PackedCache`."""
        from narrowkv.integrations import PackedCache  # the one step upwards: sugar for users

        return PackedCache(model, self, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `narrowkv.json` and `narrowkv.safetensors` into a folder; raises OutputError where that fails."""
        tensors = {
            f"layers.{i}.{side}.{name}": tensor.detach().cpu().contiguous()
            for i, pair in self.layers.items()
            for side, quantizer in zip(("keys", "values"), pair, strict=True)
            for name, tensor in quantizer.tensors().items()
        }
        content = save_tensors(tensors)
        description = {
            "format": "narrowkv-calibration",
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe.to_dict(),
            "fingerprint": asdict(self.fingerprint),
            "provenance": self.provenance,
            "shapes": {str(layer): list(shape) for layer, shape in self.shapes.items()},
            "tensors_sha256": checksum(content),
        }
        description["description_sha256"] = _description_checksum(description)
        # the description names the tensors' checksum: written last, it never describes a file that is not there
        write_atomically(Path(folder) / TENSOR_FILE, lambda temporary: _write_bytes(temporary, content))
        write_json(Path(folder) / DESCRIPTION_FILE, description)

    @classmethod
    def from_pretrained(cls, name: str | Path, model: "PreTrainedModel | None" = None) -> "Calibration":
        """Read a calibration from a local folder or, where there is none of that name, from the Hugging Face hub.

        Raises FileFormatError where files are missing, damaged or of another version, CalibrationError where `model` is
        given and is not the one it was made for (making a cache checks this again).
        """
        folder = Path(name)
        if not folder.exists():
            folder = _from_hub(str(name))
        description = read_json(folder / DESCRIPTION_FILE)
        if description.get("format") != "narrowkv-calibration":
            raise FileFormatError(f"{folder / DESCRIPTION_FILE} is not a NarrowKV calibration; name a folder with one.")
        if description.get("format_version") != FORMAT_VERSION:
            raise FileFormatError(
                f"{folder} has format {description.get('format_version')!r}, this NarrowKV reads {FORMAT_VERSION}; "
                "calibrate again, or install the version that wrote it."
            )
        if description.get("description_sha256") != _description_checksum(description):
            raise FileFormatError(
                f"{folder / DESCRIPTION_FILE} was altered (checksum differs); calibrate again or copy it again."
            )
        try:
            content = (folder / TENSOR_FILE).read_bytes()
        except OSError as error:
            raise FileFormatError(f"Cannot read {folder / TENSOR_FILE}: {error.strerror}; copy both files.") from error
        if checksum(content) != description["tensors_sha256"]:
            raise FileFormatError(
                f"{folder / TENSOR_FILE} is truncated or altered (checksum differs); calibrate again or copy it again."
            )
        try:
            loaded = cls._assemble(description, load_tensors(content))
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError, NarrowKVError) as error:
            raise FileFormatError(f"{folder} holds no usable calibration ({error}); calibrate again.") from error
        if model is not None:
            loaded.fingerprint.check(Fingerprint.of(model))
        return loaded

    @classmethod
    def _assemble(cls, description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> "Calibration":
        recipe = Recipe.from_dict(description["recipe"])
        fingerprint = Fingerprint(**description["fingerprint"])
        layers = {}
        shapes = {int(layer): (heads, dim) for layer, (heads, dim) in description["shapes"].items()}
        for i, shape in shapes.items():
            schemes = recipe.schemes(i)
            pair = []
            for side, scheme in (("keys", schemes.keys), ("values", schemes.values)):
                prefix = f"layers.{i}.{side}."
                tables = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
                quantizer = quantizer_for(scheme, **tables)
                if not quantizer.shapes() <= {shape, (1, 1)}:
                    raise FileFormatError(f"the tables of {prefix[:-1]} do not have one entry for each channel")
                pair.append(quantizer)
            layers[i] = (pair[0], pair[1])
        return cls(recipe, fingerprint, layers, shapes, description["provenance"])

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the two files to a model repository on the Hugging Face hub; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"NarrowKV calibration {self.recipe.name}"
            )
        return str(commit)


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _description_checksum(description: dict[str, Any]) -> str:
    content = {name: part for name, part in description.items() if name != "description_sha256"}
    return checksum(json.dumps(content, sort_keys=True).encode())


def _from_hub(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[DESCRIPTION_FILE, TENSOR_FILE]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileFormatError(
            f"There is no folder {repo_id}, and the hub gives none of that name ({reason}); name a calibration's folder."
        ) from error
