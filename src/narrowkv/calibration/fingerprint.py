"""Fingerprint of a model: identifies the model of a calibration, whatever dtype it is loaded in."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from narrowkv.calibration.distributed import gathered, is_split
from narrowkv.calibration.wrappers import decoder_of, unwrapped
from narrowkv.errors import CalibrationError, NarrowKVWarning

MATRICES, VECTORS, SAMPLES = 15, 4, 8
TOLERANCE = 0.02  # of a matrix's largest sample: loading in bfloat16 moves a number by 0.4%, another model by all of it
FEW_BITS = 0.4  # of all samples' length: 4 bits move them by 0.1, 2 bits by 0.3, another model by 1.4


@dataclass(frozen=True)
class Fingerprint:
    """Shape of the attention, and some elements of the weights.

    architecture: the model's type. layers, kv_heads, head_dim: of its attention. vocabulary: rows of the embedding.
    weights: by name in the language model, of its embedding and of up to 15 matrices and 4 vectors, 8 elements spread over
    each; those that are stored as floating point alone, chosen by their names, so that the same model with some weights
    quantized, or wrapped by adapters, has most of them too. few_bits: whether weights are, or
    once were, stored in few bits (GGUF, for one), and only near those that they were made from.
    """

    architecture: str
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    weights: dict[str, list[float]] = field(repr=False)
    few_bits: bool = False

    @classmethod
    def of(cls, model: Any) -> "Fingerprint":
        """Fingerprint of a loaded transformers model. If the model is split over processes, all of them must call this
        together the first time, since weights are gathered; then it is cached.
        """
        model = unwrapped(model)
        known: Fingerprint | None = vars(model).get("narrowkv_fingerprint")
        if known is not None:
            return known
        found = cls._read(model)
        if any(is_split(part) for part in model.parameters()):
            vars(model)["narrowkv_fingerprint"] = found
        return found

    @classmethod
    def _read(cls, model: Any) -> "Fingerprint":
        config = model.config.get_text_config(decoder=True)
        first = config.per_layer_config[0]  # some models have heads of their own in each layer
        heads = first.num_attention_heads
        return cls(
            architecture=config.model_type,
            layers=config.num_hidden_layers,
            kv_heads=getattr(first, "num_key_value_heads", None) or heads,
            head_dim=getattr(first, "head_dim", None) or config.hidden_size // heads,
            vocabulary=model.get_input_embeddings().weight.shape[0],
            weights={name: _sample(gathered(part)) for name, part in sorted(_picked(model))},
            few_bits=bool(vars(model).get("narrowkv_few_bits", False) or getattr(model, "is_quantized", False)),
        )

    @classmethod
    def from_dict(cls, plain: Any) -> "Fingerprint":
        """Inverse of `asdict`; raises CalibrationError on anything else."""
        try:
            found = cls(**plain)
            sizes = (found.layers, found.kv_heads, found.head_dim, found.vocabulary)
            fits = isinstance(found.architecture, str) and all(type(size) is int for size in sizes)
            samples = [number for sample in found.weights.values() for number in sample]
        except (TypeError, AttributeError):
            fits, samples = False, []
        if not fits or any(type(number) is not float for number in samples):
            raise CalibrationError("This is no fingerprint of a model; calibrate, or read the prompt, again.")
        return found

    def check(self, other: "Fingerprint") -> None:
        """Raise CalibrationError if `other`, of the model at hand, is of another model than this one."""
        for name in ("architecture", "layers", "kv_heads", "head_dim", "vocabulary"):
            expected, found = getattr(self, name), getattr(other, name)
            if expected != found:
                raise CalibrationError(
                    f"This calibration belongs to another model ({name} {expected} there, {found} here); calibrate this model."
                )
        if self.few_bits or other.few_bits:
            return self._check_near(other)
        for name in self._comparable(other):
            if not _alike(self.weights[name], other.weights[name]):
                raise CalibrationError(
                    f"This calibration belongs to another model (other weights in {name}); calibrate this model."
                )

    def _check_near(self, other: "Fingerprint") -> None:
        """Compare weights of which some have, or had, few bits."""
        moved = length = 0.0
        for name in self._comparable(other):
            expected, found = self.weights[name], other.weights[name]
            if len(found) != len(expected):
                continue
            scale = sum(number**2 for number in expected) or 1.0
            moved += sum((ours - theirs) ** 2 for ours, theirs in zip(expected, found, strict=True)) / scale
            length += 1
        if moved > FEW_BITS**2 * length:
            raise CalibrationError(
                "This calibration belongs to another model (its weights are far from these, even for few bits); "
                "calibrate this model."
            )

    def _comparable(self, other: "Fingerprint") -> list[str]:
        """Names of the weights that both have; where there are none, a warning says so."""
        both = [name for name in self.weights if name in other.weights]
        if not both:
            warnings.warn(
                "No weight of this model is stored as the calibration knew it (quantized weights?), so whether it is the same "
                "model cannot be determined; compare answers, or calibrate this model.",
                NarrowKVWarning,
                stacklevel=4,
            )
        return both


def _picked(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The embedding, and the matrices and vectors whose hashed names come first: the same ones, whatever else a model has."""
    plain = dict(_plain_weights(decoder_of(model)))
    embedding = model.get_input_embeddings()
    for dimensions, count in ((2, MATRICES), (1, VECTORS)):
        found = [(name, part) for name, part in plain.items() if part.dim() == dimensions]
        found.sort(key=lambda named: hashlib.sha256(named[0].encode()).digest())
        yield from found[:count]
        yield from (named for named in found[count:] if named[1] is embedding.weight)


def _plain_weights(decoder: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights that are floating point elements themselves, without what adapters of PEFT add to a name or a
    model.
    """
    for name, part in decoder.named_parameters():
        plain = type(part) in (torch.Tensor, nn.Parameter) or is_split(part)
        if plain and part.is_floating_point() and not part.is_meta and "lora_" not in name:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), part


def sampled_positions(size: int) -> torch.Tensor:
    """Which of a weight's elements, in the order of its rows, are compared: [8] int64."""
    return torch.linspace(0, size - 1, SAMPLES, dtype=torch.float64, device="cpu").long()


def _sample(matrix: torch.Tensor) -> list[float]:
    flat = matrix.detach().flatten()
    return flat[sampled_positions(len(flat)).to(flat.device)].float().tolist()


def _alike(expected: list[float], found: list[float]) -> bool:
    largest = max((abs(number) for number in expected), default=0.0)
    return len(expected) == len(found) and all(
        abs(ours - theirs) <= TOLERANCE * largest for ours, theirs in zip(expected, found, strict=True)
    )
