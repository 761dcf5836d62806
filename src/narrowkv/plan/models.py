"""The shape of a model, read from its configuration alone: layers, heads, windows, weights. No weight is loaded.

The model is built on torch's meta device, where tensors have shapes but no memory, and run there on a few tokens by the probe
that serves real models, so that whatever the family, keys and values are those that it would store.
"""

import fnmatch
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from narrowkv.attention import Rope
from narrowkv.errors import BudgetError, NarrowKVError, UnsupportedModelError, reason
from narrowkv.integrations.folders import single_file
from narrowkv.integrations.frequencies import STATIC_ROPE, frequencies, has_sections
from narrowkv.integrations.gguf import gguf_config
from narrowkv.integrations.models import DTYPES, model_folder
from narrowkv.integrations.probe import AttentionTrace, keeps_keys, own_layers, text_config, watch
from narrowkv.integrations.projections import ConstantKinds, constant_kinds
from narrowkv.integrations.versions import keeps_nothing

SHAPES: dict[str, dict[str, Any]] = {  # as published
    "llama-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "llama-13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
    "llama-30b": {"hidden_size": 6656, "num_hidden_layers": 60, "num_attention_heads": 52, "intermediate_size": 17920},
    "llama-65b": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 22016},
    "llama-2-70b": {
        **{"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
        "num_key_value_heads": 8,
    },
    "llama-3-8b": {
        **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
        **{"num_key_value_heads": 8, "vocab_size": 128256},
    },
    "llama-3-70b": {
        **{"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
        **{"num_key_value_heads": 8, "vocab_size": 128256},
    },
}


@dataclass(frozen=True)
class AttentionShape:
    """One layer that keeps keys and values.

    constants: what its projections add and its norm scales. record: the name of what is stored of each token, once for all
    layers of that name, where keys or their bias are rotated when they are read: `positions`, or tables of this many `angles`;
    None where the model never rotates its keys.
    """

    layer: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None
    constants: ConstantKinds
    record: str | None
    angles: int = 0


@dataclass(frozen=True)
class ModelShape:
    """dtype: of weights and activations. weights, split_weights: elements in all, and those that tensor parallelism divides,
    the others being in every device. others: layers that keep a state of their own.
    """

    name: str
    dtype: torch.dtype
    weights: int
    split_weights: int
    layers: tuple[AttentionShape, ...]
    others: int

    def parts(self, devices: int) -> int:
        """Into how many parts the KV heads are divided, at most `devices`; if there are fewer, every part is stored several
        times. Raises BudgetError where heads and devices do not fit together.
        """
        heads = min(layer.kv_heads for layer in self.layers)
        parts = min(devices, heads)
        if any(layer.kv_heads % parts for layer in self.layers) or devices % parts:
            raise BudgetError(
                f"{devices} GPUs cannot share {heads} KV heads evenly; choose a divisor or a multiple of {heads}."
            )
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: how many layers have each shape."""
        kinds = Counter((layer.kv_heads, layer.head_dim, layer.sliding_window) for layer in self.layers)
        return {
            "model": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": self.weights,
            "layers": [
                {"count": count, "kv_heads": heads, "head_dim": dim, "sliding_window": window}
                for (heads, dim, window), count in kinds.items()
            ],
            "other_layers": self.others,
        }

    def weight_bytes(self, devices: int, bits: float | None = None) -> int:
        """Bytes of weights in each device; bits: of each weight, those of the dtype by default."""
        elements = self.weights - self.split_weights + -(-self.split_weights // devices)
        return round(elements * (8 * self.dtype.itemsize if bits is None else bits) / 8)


def read_shape(name: str, dtype: str = "auto") -> ModelShape:
    """The shape of a model: a local folder, a hub id, `narrowkv://demo`, or one of SHAPES.

    dtype: of its weights, by default that of the configuration. Raises UnsupportedModelError where the model cannot be served.
    """
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"There is no dtype {dtype!r}; choose auto, float32, bfloat16 or float16.")
    config = _config(name)
    chosen = DTYPES[dtype] if dtype != "auto" else config.get_text_config(decoder=True).dtype or config.dtype or torch.bfloat16
    try:
        model = _on_meta(config)
        with torch.no_grad():
            seen, running = watch(model)
            layers = tuple(_layers(model, seen, running))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"From its configuration, {name} cannot be planned for: {error}") from error
    others = [layer for layer in own_layers(text_config(model)) if not keeps_keys(layer) and not keeps_nothing(layer)]
    return ModelShape(
        name=name,
        dtype=chosen,
        weights=sum(parameter.numel() for parameter in model.parameters()),
        split_weights=_split_weights(model),
        layers=layers,
        others=len(others),
    )


def _config(name: str) -> Any:
    if name in SHAPES:
        return AutoConfig.for_model("llama", **SHAPES[name], tie_word_embeddings=False, dtype="float16")
    try:
        folder = model_folder(name)
        file = single_file(folder)
        return AutoConfig.from_pretrained(folder) if file is None else gguf_config(file)
    except NarrowKVError:
        raise
    except Exception as error:  # transformers raises errors of all kinds for files it cannot read
        raise UnsupportedModelError(
            f"Cannot read the configuration of {name} ({reason(error)}); give a folder, a hub id, "
            f"or one of {', '.join(SHAPES)}."
        ) from error


def _on_meta(config: Any) -> PreTrainedModel:
    """The model without memory behind its weights."""
    kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    try:
        with torch.device("meta"):
            # layers of experts compute in this dtype only on the meta device; no shape depends on it
            return kind.from_config(config, dtype=torch.bfloat16).eval()
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError) as error:
        raise UnsupportedModelError(f"transformers cannot build it as a language model ({reason(error)}).") from error


def _split_weights(model: PreTrainedModel) -> int:
    """How many elements transformers divides between devices, by the model's own plan."""
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}
    patterns = [name for name, style in plan.items() if not style.startswith("replicated")]
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if any(fnmatch.fnmatchcase(part, pattern) for part in (name, name.rpartition(".")[0]) for pattern in patterns)
    )


def _layers(model: PreTrainedModel, seen: list[AttentionTrace], running: list[AttentionTrace]) -> Iterator[AttentionShape]:
    """What is known of attention modules; of their rotary embeddings, what can be without elements."""
    own = own_layers(text_config(model))
    names: dict[int, str] = {}
    for one in seen:
        tables, positions = one.kwargs.get("position_embeddings"), one.kwargs.get("position_ids")
        record, angles = None, 0
        if tables is not None:
            width = (tables if isinstance(tables, torch.Tensor) else tables[0]).shape[-1]  # each angle once, or twice
            known = [(len(inverse), kind) for inverse, _, kind in frequencies(model) if len(inverse) in (width, width // 2)]
            by_position = positions is not None and positions.dim() == 2 and not has_sections(model)
            if by_position and any(kind in STATIC_ROPE for _, kind in known):
                record = Rope.record
            else:
                record, angles = names.setdefault(id(tables), f"angles{len(names)}"), known[0][0] if known else width // 2
        window = getattr(own[one.layer], "sliding_window", None)
        constants = constant_kinds(one.module, functools.partial(one.run, running))
        yield AttentionShape(one.layer, one.keys[0].shape[1], one.keys[0].shape[3], window, constants, record, angles)
